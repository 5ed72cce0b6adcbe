"""Whether a large plain value is still what it was when it was encoded, which is quicker to see than to encode it."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

from distckpt.format.tree.many import ATOMS
from distckpt.format.tree.values import MAX_DEPTH

_MAPPINGS = frozenset({dict, OrderedDict, Counter, defaultdict})
_HOLDERS = _MAPPINGS | {list, tuple, set, frozenset, deque}
_PLAIN = frozenset({list, tuple, dict})
_FIXED = ATOMS | {tuple, frozenset}
"""What can change only if what is inside of it can."""


@dataclass(frozen=True, slots=True)
class _Level:
    """Values side by side: the things themselves, and of those that hold others how many, and what else counts."""

    values: list[Any]
    forms: list[Any]


class Snapshot:
    """What a value was made of at one moment: every container and every item, which are kept, so that none of them gives
    its identity to another. Costs a word of memory an item."""

    def __init__(self, levels: list[_Level]) -> None:
        self._levels = levels

    def is_of(self, value: Any) -> bool:
        """Whether ``value`` is made of the very same things still. What holds nothing never changes."""
        if len(self._levels) == 1 and not self._levels[0].forms:
            return value is self._levels[0].values[0]
        found = _levels_of(value)
        return all(_are_same(level, next(found, None)) for level in self._levels)


def snapshot_of(value: Any) -> Snapshot | None:
    """As it is now; None if it has parts that can change without a sign, such as an array or an object."""
    levels: list[_Level] = []
    kinds: list[set[type]] = []
    for level in _levels_of(value):
        if level is None:
            return None
        levels.append(level)
        kinds.append(set(map(type, level.values)))
    while len(levels) > 1 and kinds[-2] <= _FIXED and kinds[-1] <= _FIXED:
        levels.pop()  # what it is in cannot change, and is known by itself
        kinds.pop()
    return Snapshot(levels)


def _are_same(one: _Level, other: _Level | None) -> bool:
    if other is None or len(one.values) != len(other.values) or one.forms != other.forms:
        return False
    return all(map(is_, one.values, other.values))


def _levels_of(value: Any) -> Iterator[_Level | None]:
    """From the value itself to what is inside of what is inside. None, at its end, if it cannot be taken apart."""
    values = [value]
    for _ in range(MAX_DEPTH + 2):
        kinds = set(map(type, values))
        if kinds <= ATOMS:
            yield _Level(values, [])
            return
        if not kinds <= ATOMS | _HOLDERS:
            break
        forms: list[Any]
        if len(kinds) == 1 and kinds <= _PLAIN:  # the usual case of very many, without a look at each
            forms = list(map(len, values))
            parts = chain(values) if dict not in kinds else chain(values, map(dict.values, values))
        else:
            holders = [each for each in values if type(each) in _HOLDERS]
            forms = list(map(_form_of, holders))
            parts = chain.from_iterable(
                (each, each.values()) if type(each) in _MAPPINGS else (each,) for each in holders
            )
        yield _Level(values, forms)
        values = list(chain.from_iterable(parts))
    yield None


def _form_of(holder: Any) -> Any:
    """What of it is not among its parts."""
    if type(holder) is defaultdict:
        return len(holder), holder.default_factory
    return (len(holder), *vars(holder)) if type(holder) is OrderedDict else len(holder)
