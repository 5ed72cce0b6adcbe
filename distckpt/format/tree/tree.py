"""From a nested tree to its leaves and back. Knows neither torch nor what a leaf holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from distckpt.errors import EncodeError
from distckpt.format.tree.classes import Refused, is_step
from distckpt.format.tree.containers import Kind, container, entries_of, is_container, items_of, kind_of, parts_of
from distckpt.format.tree.many import ATOMS, hold_nothing
from distckpt.format.tree.path import (
    ArrayStep,
    DictStep,
    KeyStep,
    ListStep,
    Path,
    RankStep,
    Step,
    TupleStep,
    TypedStep,
    decode_path,
    encode_path,
    key_of,
)
from distckpt.format.tree.values import MAX_DEPTH, decode_value, encode_value

__all__ = [
    "ArrayStep",
    "DictStep",
    "KeyStep",
    "Leaf",
    "ListStep",
    "Path",
    "RankStep",
    "Step",
    "TupleStep",
    "TypedStep",
    "decode_path",
    "encode_path",
    "flatten",
    "key_of",
    "unflatten",
]


MANY = 16
"""So many items are looked at together, however deep they are, before any of them is looked at by itself."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor, or a plain value, and where it was."""

    path: Path
    key: str
    value: Any


# ---- tree to leaves -----------------------------------------------------------------------------------------------


def flatten(tree: object, is_array: Callable[[object], bool], prefix: Path = (), most: int | None = None) -> list[Leaf]:
    """The leaves of ``tree`` in its own order, with paths that begin with ``prefix``.

    Non-empty dicts are entered; lists, tuples and all other containers, and with ``most`` dicts of more than so many
    items, only if there is an array somewhere in them. All else is a leaf. Raises EncodeError for a tree that holds
    itself or is deeper than 100 levels, for two leaves of one key, and for an array in a container that could not be
    made again.
    """
    walk = _Walk(is_array, most)
    try:
        walk.visit(tree, prefix)
    except EncodeError:
        raise
    except Exception as error:
        raise EncodeError(key_of(prefix), f"walking through it raised {type(error).__name__}") from error
    return walk.leaves


class _Walk:
    def __init__(self, is_array: Callable[[object], bool], most: int | None) -> None:
        self.leaves: list[Leaf] = []
        self._is_array = is_array
        self._most = most
        self._keys: dict[str, Path] = {}
        self._has_array: dict[int, bool] = {}
        self._inside: set[int] = set()

    def visit(self, node: Any, path: Path) -> None:
        entered = None if type(node) in ATOMS or self._is_array(node) else self._entered(node, path)
        if entered is None:
            self._add(node, path)
            return
        self._enter(node, path)
        for step, child in entered:
            self.visit(child, (*path, step))
        self._inside.discard(id(node))

    def _entered(self, node: Any, path: Path) -> Iterable[tuple[Step, Any]] | None:
        """The items of ``node`` and the steps to them; None if it is a leaf."""
        if type(node) is dict:
            is_whole = not node or (
                self._most is not None and len(node) > self._most and not self._holds_array(node, path)
            )
            return None if is_whole else _pair_steps(node.items())
        if not _holds_items(node) or not self._holds_array(node, path):
            return None
        if type(node) is list:
            return ((ListStep(index), item) for index, item in enumerate(node))
        if type(node) is tuple:
            return ((TupleStep(index), item) for index, item in enumerate(node))
        try:
            return _typed_steps(node)
        except Refused as why:
            raise EncodeError(key_of(path), str(why)) from why

    def _holds_array(self, node: Any, path: Path) -> bool:
        if type(node) in ATOMS:
            return False
        if self._is_array(node) or not _holds_items(node):
            return self._is_array(node)
        known = self._has_array.get(id(node))
        if known is None:
            self._enter(node, path)
            known = self._has_array[id(node)] = any(self._holds_array(item, path) for item in _items(node))
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


def _holds_items(node: Any) -> bool:
    return type(node) in (list, tuple, dict) or is_container(node)


def _items(node: Any) -> Iterable[Any]:
    if type(node) is dict:
        items: Collection[Any] = node.values()
    elif type(node) in (list, tuple):
        items = node
    else:
        try:
            items = items_of(node)
        except Refused:
            return ()  # then it is a leaf, and refused as a value
    return () if hold_nothing(items, MAX_DEPTH if len(items) >= MANY else 1) else items


def _pair_steps(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[DictStep | KeyStep, Any]] | None:
    """The steps by the keys; None if there is a key that cannot stand in a path."""
    steps: list[tuple[DictStep | KeyStep, Any]] = []
    for key, item in pairs:
        if type(key) is str:
            steps.append((DictStep(key), item))
        elif _is_plain(key):
            steps.append((KeyStep(key), item))
        else:
            return None
    return steps


def _typed_steps(node: Any) -> Iterable[tuple[Step, Any]] | None:
    kind, entries = kind_of(node), entries_of(node)
    if parts_of(kind) == "items":
        return [(TypedStep(kind, ListStep(index)), item) for index, item in entries]
    steps = _pair_steps(entries)
    return None if steps is None else [(TypedStep(kind, step), item) for step, item in steps]


def _is_plain(key: Any) -> bool:
    """Whether a dict key comes back equal from its text (nan, for one, does not), and can stand in a path."""
    if type(key) in (int, bool, bytes):
        return True
    try:
        return is_step(key) and bool(decode_value(encode_value(key, ""), "", "") == key)
    except Exception:  # noqa: BLE001  whatever comparing it raises, it is no key for a path
        return False


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
    kinds = {_kind_of_step(step) for step in built}
    if len(kinds) > 1:
        raise ValueError(f"{key_of(path)!r} cannot be several kinds of container at once")
    [(kind, steps)] = kinds
    if steps is ArrayStep:
        return next(iter(built.values())).numpy()
    if steps is DictStep:
        pairs = [(_item(step), child) for step, child in built.items()]
        return dict(pairs) if kind is None else container(kind, pairs)
    items = [child for _, child in sorted(built.items(), key=_number)]
    if steps is RankStep:
        return items
    most = max(map(_number, built.items()))
    if most != len(items) - 1:
        raise ValueError(f"{key_of(path)!r} has {most + 1} items, and only {len(items)} of them are there")
    if kind is not None:
        return container(kind, list(enumerate(items)))
    return items if steps is ListStep else tuple(items)


def _kind_of_step(step: Step) -> tuple[Kind | None, type]:
    if isinstance(step, TypedStep):
        return step.kind, _kind_of_step(step.step)[1]
    return None, DictStep if isinstance(step, KeyStep) else type(step)


def _item(step: Step) -> Any:
    """What stands in the dict for the step."""
    inner = step.step if isinstance(step, TypedStep) else step
    return inner.key if isinstance(inner, KeyStep) else str(inner)


def _number(item: tuple[Any, Any]) -> int:
    step: Any = item[0].step if isinstance(item[0], TypedStep) else item[0]
    return int(step.rank if isinstance(step, RankStep) else step.index)
