"""From a nested tree to its leaves and back. Knows neither torch nor what a leaf holds.

A leaf has a path, which says exactly where it was (``decode_path(encode_path(path)) == path``), and a key, which is the
path as people write it: steps joined with dots, and ``@3`` for the state of rank 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.values import DICTS, MAX_DEPTH, decode_value, encode_value


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
        return str(self.key)


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


Step = DictStep | KeyStep | ListStep | TupleStep | RankStep
Path = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor, or a plain value, and where it was."""

    path: Path
    key: str
    value: Any


def key_of(path: Path) -> str:
    """The path as people write it: ``model.layers.0.weight``, ``loader@3.cursor``."""
    parts: list[str] = []
    for step in path:
        if not isinstance(step, RankStep):
            parts.append(str(step))
        elif parts:
            parts[-1] += f"@{step.rank}"
        else:
            parts.append(f"@{step.rank}")
    return ".".join(parts)


# ---- tree to leaves -----------------------------------------------------------------------------------------------


def flatten(tree: object, is_array: Callable[[object], bool], prefix: Path = ()) -> list[Leaf]:
    """The leaves of ``tree`` in its own order, with paths that begin with ``prefix``.

    Non-empty dicts are entered; lists and tuples only if there is an array somewhere in them. All else is a leaf.
    Raises EncodeError for a tree that holds itself or is deeper than 100 levels, and for two leaves of one key.
    """
    walk = _Walk(is_array)
    walk.visit(tree, prefix)
    return walk.leaves


_CONTAINERS = (list, tuple, *DICTS)


class _Walk:
    def __init__(self, is_array: Callable[[object], bool]) -> None:
        self.leaves: list[Leaf] = []
        self._is_array = is_array
        self._keys: dict[str, Path] = {}
        self._has_array: dict[int, bool] = {}
        self._inside: set[int] = set()

    def visit(self, node: Any, path: Path) -> None:
        if self._is_array(node) or not self._is_entered(node, path):
            self._add(node, path)
            return
        self._enter(node, path)
        for step, child in _children(node):
            self.visit(child, (*path, step))
        self._inside.discard(id(node))

    def _is_entered(self, node: Any, path: Path) -> bool:
        if type(node) in DICTS:
            return bool(node) and all(type(key) is str or _is_plain(key) for key in node)
        return type(node) in (list, tuple) and self._holds_array(node, path)

    def _holds_array(self, node: Any, path: Path) -> bool:
        if type(node) not in _CONTAINERS:
            return self._is_array(node)
        known = self._has_array.get(id(node))
        if known is None:
            self._enter(node, path)
            items = node if type(node) in (list, tuple) else node.values()
            known = self._has_array[id(node)] = any(self._holds_array(item, path) for item in items)
            self._inside.discard(id(node))
        return known

    def _enter(self, node: Any, path: Path) -> None:
        if id(node) in self._inside:
            raise EncodeError(key_of(path), f"the {type(node).__name__} here holds itself; only trees can be stored")
        if len(self._inside) >= MAX_DEPTH:
            raise EncodeError(key_of(path), f"is nested deeper than {MAX_DEPTH} levels")
        self._inside.add(id(node))

    def _add(self, node: Any, path: Path) -> None:
        key = key_of(path)
        other = self._keys.setdefault(key, path)
        if other is not path:
            raise EncodeError(
                key, f"two leaves have this key: {encode_path(other)} and {encode_path(path)}. Rename one of them"
            )
        self.leaves.append(Leaf(path, key, node))


def _children(node: Any) -> Iterable[tuple[Step, Any]]:
    if type(node) is list:
        return ((ListStep(index), item) for index, item in enumerate(node))
    if type(node) is tuple:
        return ((TupleStep(index), item) for index, item in enumerate(node))
    return ((DictStep(key) if type(key) is str else KeyStep(key), item) for key, item in node.items())


def _is_plain(key: Any) -> bool:
    """Whether a dict key comes back equal from its text (nan, for one, does not)."""
    try:
        return bool(decode_value(encode_value(key, ""), "", "") == key)
    except EncodeError:
        return False


# ---- paths as text ------------------------------------------------------------------------------------------------


class _StepText(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    key: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    list: int | msgspec.UnsetType = msgspec.UNSET
    tuple: int | msgspec.UnsetType = msgspec.UNSET
    rank: int | msgspec.UnsetType = msgspec.UNSET


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
    match text.key, text.list, text.tuple, text.rank:
        case msgspec.Raw() as raw, msgspec.UNSET, msgspec.UNSET, msgspec.UNSET:
            return _key_step(decode_value(raw, where, "a key in a path"), where)
        case msgspec.UNSET, int(index), msgspec.UNSET, msgspec.UNSET if index >= 0:
            return ListStep(index)
        case msgspec.UNSET, msgspec.UNSET, int(index), msgspec.UNSET if index >= 0:
            return TupleStep(index)
        case msgspec.UNSET, msgspec.UNSET, msgspec.UNSET, int(rank) if rank >= 0:
            return RankStep(rank)
    raise DamagedError(where, "a step of a path says several things, nothing, or a negative number")


def _key_step(key: Any, where: str) -> KeyStep:
    try:
        hash(key)
    except TypeError as error:
        raise DamagedError(where, "a step of a path has a key that no dict can have") from error
    if type(key) is str:
        raise DamagedError(where, "a step of a path has a str in a form for other keys")
    return KeyStep(key)


# ---- leaves to tree -----------------------------------------------------------------------------------------------


class _Node:
    """A container while its items come in."""

    __slots__ = ("children",)

    def __init__(self) -> None:
        self.children: dict[Step, Any] = {}


def unflatten(leaves: Iterable[tuple[Path, Any]]) -> Any:
    """The tree that has these leaves; dicts keep the order in which their items come. No leaves make an empty dict.

    Per-rank steps become a list ordered by rank. Raises ValueError for leaves that do not make a tree: two at one
    place, one inside another, a dict that is also a list, a list or tuple with holes.
    """
    root = _Node()
    for path, value in leaves:
        _place(root, path, value)
    return _built(root.children[_ROOT], ()) if root.children else {}


_ROOT = DictStep("")


def _place(root: _Node, path: Path, value: Any) -> None:
    *above, last = (_ROOT, *path)
    node = root
    for depth, step in enumerate(above):
        node = node.children.setdefault(step, _Node())
        if not isinstance(node, _Node):
            raise ValueError(f"{key_of(path[:depth])!r} is a leaf, and {key_of(path)!r} is inside it")  # noqa: TRY004
    if last in node.children:
        raise ValueError(f"{key_of(path)!r} is there twice, or has leaves inside it")
    node.children[last] = value


def _built(node: Any, path: Path) -> Any:
    if not isinstance(node, _Node):
        return node
    built = {step: _built(child, (*path, step)) for step, child in node.children.items()}
    kinds = {DictStep if isinstance(step, KeyStep) else type(step) for step in built}
    if len(kinds) > 1:
        raise ValueError(f"{key_of(path)!r} cannot be several kinds of container at once")
    if kinds == {DictStep}:
        return {step.key if isinstance(step, KeyStep) else str(step): child for step, child in built.items()}
    if kinds == {RankStep}:
        return [child for _, child in sorted(built.items(), key=_number)]
    items = sorted(built.items(), key=_number)
    if _number(items[-1]) != len(items) - 1:
        raise ValueError(
            f"{key_of(path)!r} has {_number(items[-1]) + 1} items, and only {len(items)} of them are there"
        )
    return [child for _, child in items] if kinds == {ListStep} else tuple(child for _, child in items)


def _number(item: tuple[Any, Any]) -> int:
    step = item[0]
    return int(step.rank if isinstance(step, RankStep) else step.index)
