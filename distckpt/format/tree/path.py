"""The paths of leaves: which steps lead to them, the text that says them, and the key that people write.

A path says exactly where a leaf was (``decode_path(encode_path(path)) == path``); its key is the steps joined with dots,
and ``@3`` for the state of rank 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.classes import is_step, key_text
from distckpt.format.tree.containers import Kind, check_kind, parts_of
from distckpt.format.tree.values import MAX_DEPTH, decode_value, encode_value


@dataclass(frozen=True, slots=True)
class DictStep:
    """Into a dict by a str, written as that str."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class KeyStep:
    """Into a dict by a key that is no str: ``{"key":7}``."""

    key: Any

    def __str__(self) -> str:
        return key_text(self.key)


@dataclass(frozen=True, slots=True)
class ListStep:
    """Into a list: ``{"list":0}``."""

    index: int

    def __str__(self) -> str:
        return str(self.index)


@dataclass(frozen=True, slots=True)
class TupleStep:
    """Into a tuple: ``{"tuple":0}``."""

    index: int

    def __str__(self) -> str:
        return str(self.index)


@dataclass(frozen=True, slots=True)
class RankStep:
    """Into the state that belongs to one rank: ``{"rank":3}``."""

    rank: int


@dataclass(frozen=True, slots=True)
class TypedStep:
    """Into a container of another type than these, of which ``kind`` says all: ``{"of":["OrderedDict"],"name":"w"}``.

    ``step`` is the step into the plain dict or list that has the same items; fields are steps by their names.
    """

    kind: Kind
    step: DictStep | KeyStep | ListStep

    def __str__(self) -> str:
        return str(self.step)


@dataclass(frozen=True, slots=True)
class ArrayStep:
    """The last one, to a NumPy array rather than to a tensor: ``{"array":"numpy"}``. It is in no key."""


Step = DictStep | KeyStep | ListStep | TupleStep | RankStep | TypedStep | ArrayStep
Path = tuple[Step, ...]


def key_of(path: Path) -> str:
    """The path as people write it: ``model.layers.0.weight``, ``loader@3.cursor``."""
    parts: list[str] = []
    for step in path:
        if isinstance(step, ArrayStep):
            continue
        if not isinstance(step, RankStep):
            parts.append(str(step))
        elif parts:
            parts[-1] += f"@{step.rank}"
        else:
            parts.append(f"@{step.rank}")
    return ".".join(parts)


# ---- paths as text ------------------------------------------------------------------------------------------------


class _StepText(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    key: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    list: int | msgspec.UnsetType = msgspec.UNSET
    tuple: int | msgspec.UnsetType = msgspec.UNSET
    rank: int | msgspec.UnsetType = msgspec.UNSET
    of: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    array: str | msgspec.UnsetType = msgspec.UNSET


_MOST_STEPS = 2 * MAX_DEPTH  # what flatten allows, and room for prefixes
_PATH_DECODER = msgspec.json.Decoder(list[str | _StepText])


def encode_path(path: Path) -> str:
    """The path as compact JSON: ``["optimizer","param_groups",{"list":0},"lr"]``."""
    try:
        return msgspec.json.encode([_step_text(step) for step in path]).decode()
    except UnicodeEncodeError as error:
        raise EncodeError(key_of(path), "half a surrogate pair in a key: it is not valid Unicode") from error


def _step_text(step: Step) -> str | _StepText:
    match step:
        case DictStep(name):
            return name
        case KeyStep(key):
            return _StepText(key=msgspec.Raw(encode_value(key, str(key))))
        case ListStep(index):
            return _StepText(list=index)
        case TupleStep(index):
            return _StepText(tuple=index)
        case RankStep(rank):
            return _StepText(rank=rank)
        case ArrayStep():
            return _StepText(array="numpy")
        case TypedStep(kind, inner):
            text = _step_text(inner)
            named = _StepText(name=text) if isinstance(text, str) else text
            return msgspec.structs.replace(named, of=msgspec.Raw(msgspec.json.encode(kind)))


def decode_path(text: str | bytes, where: str) -> Path:
    """The path that ``text`` says. Raises DamagedError, naming ``where``, for anything that encode_path does not write."""
    try:
        steps = _PATH_DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DamagedError(where, f"not the text of a path: {error}") from error
    if len(steps) > _MOST_STEPS:
        raise DamagedError(where, f"a path of {len(steps)} steps")
    return tuple(_step(step, where) for step in steps)


def _step(text: str | _StepText, where: str) -> Step:
    if isinstance(text, str):
        return DictStep(text)
    said = {name: getattr(text, name) for name in text.__struct_fields__}
    said = {name: value for name, value in said.items() if value is not msgspec.UNSET}
    of = said.pop("of", None)
    match said:
        case {"key": key} if len(said) == 1:
            return _typed(of, _key_step(decode_value(key, where, "a key in a path"), where), where)
        case {"list": index} if len(said) == 1 and index >= 0:
            return _typed(of, ListStep(index), where)
        case {"name": name} if len(said) == 1 and of is not None:
            return _typed(of, DictStep(name), where)
        case {"tuple": index} if len(said) == 1 and of is None and index >= 0:
            return TupleStep(index)
        case {"rank": rank} if len(said) == 1 and of is None and rank >= 0:
            return RankStep(rank)
        case {"array": "numpy"} if len(said) == 1 and of is None:
            return ArrayStep()
    raise DamagedError(where, "a step of a path says several things, nothing, or a negative number")


def _typed(of: msgspec.Raw | None, step: DictStep | KeyStep | ListStep, where: str) -> Step:
    if of is None:
        return step
    try:
        kind = check_kind(msgspec.json.decode(of))
    except (msgspec.MsgspecError, ValueError) as error:
        raise DamagedError(where, f"a step into a container of no known kind: {error}") from error
    if isinstance(step, ListStep) != (parts_of(kind) == "items") or (
        parts_of(kind) == "fields" and not isinstance(step, DictStep)
    ):
        raise DamagedError(where, f"a step into a {kind[0]} that has no such steps")
    return TypedStep(kind, step)


def _key_step(key: Any, where: str) -> KeyStep:
    if not is_step(key):
        raise DamagedError(where, "a step of a path has a key that no path can have")
    try:
        hash(key)
    except TypeError as error:
        raise DamagedError(where, "a step of a path has a key that no dict can have") from error
    if type(key) is str:
        raise DamagedError(where, "a step of a path has a str in a form for other keys")
    return KeyStep(key)
