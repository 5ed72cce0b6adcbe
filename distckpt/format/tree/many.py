"""Many plain values at once: what is alike is looked at together, so that a million numbers cost next to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import chain, islice
from typing import Any

AS_IS = frozenset({type(None), bool, str})
NUMBERS = frozenset({int, float})
ATOMS = AS_IS | NUMBERS | {complex, bytes}
"""The types that hold nothing."""

INT64 = 1 << 63

Encode = Callable[[Any], Any]
"""Given a value that holds nothing, what msgspec shall write for it."""


HOLDERS = frozenset({list, tuple, dict})


def hold_nothing(values: Collection[Any], levels: int) -> bool:
    """Whether they, and all items of those that are lists, tuples and dicts, are of types that hold nothing, as can be
    seen without a look at each; False beyond so many ``levels``."""
    for _ in range(levels + 1):
        kinds = set(map(type, values))
        if kinds <= ATOMS:
            return True
        if not kinds <= ATOMS | HOLDERS:
            return False
        held: Collection[Any] = values if kinds <= HOLDERS else [value for value in values if type(value) in HOLDERS]
        if len(set(map(id, held))) < len(held):  # each once: one that holds itself would come again and again
            held = list({id(value): value for value in held}.values())
        parts = held if dict not in kinds else (value.values() if type(value) is dict else value for value in held)
        values = list(chain.from_iterable(parts))
    return False


def are_json(values: Collection[Any]) -> bool:
    """Whether msgspec may write each of them as it is."""
    kinds = set(map(type, values))
    if not kinds <= AS_IS | NUMBERS:
        return False
    ints = _of_type(values, int, kinds)
    return (not ints or (min(ints) >= -INT64 and max(ints) < INT64)) and all(
        map(math.isfinite, _of_type(values, float, kinds))
    )


def plain_many(values: Sequence[Any], encode: Encode, levels: int) -> Sequence[Any] | None:
    """What msgspec shall write for each; None if they are not alike, and each must be looked at by itself.

    They are alike if all hold nothing, or all are lists, tuples or dicts of text, of items that are alike, and so on,
    for at most so many ``levels``. What holds itself is not, and costs no more than there is of it.
    """
    kinds = set(map(type, values))
    if kinds <= ATOMS:
        return values if are_json(values) else list(map(encode, values))
    if len(kinds) > 1 or levels <= 0:
        return None
    kind = kinds.pop()
    if kind in (list, tuple):
        items = list(chain.from_iterable(values))
    elif kind is dict and all(type(name) is str and name[:1] != "$" for name in set(chain.from_iterable(values))):
        items = list(chain.from_iterable(map(dict.values, values)))
    else:
        return None
    if not set(map(type, items)) <= ATOMS and len(set(map(id, values))) < len(values):
        return None  # the same again and again could be one that holds itself
    plain = plain_many(items, encode, levels - 1)
    if plain is None:
        return None
    parts = values if plain is items else list(_taken_apart(values, plain))
    return [{"$tuple": part} for part in parts] if kind is tuple else parts


def _taken_apart(values: Sequence[Any], items: Sequence[Any]) -> Sequence[Any]:
    """The items of all, as those of each."""
    rest = iter(items)
    if values and type(values[0]) is dict:
        return [dict(zip(value, islice(rest, len(value)), strict=True)) for value in values]
    return [list(islice(rest, len(value))) for value in values]


def _of_type(values: Collection[Any], kind: type, kinds: set[type]) -> Collection[Any]:
    if kind not in kinds:
        return ()
    return values if len(kinds) == 1 else [value for value in values if type(value) is kind]
