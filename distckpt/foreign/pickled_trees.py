"""Trees that pickles describe: what of them can be had, and whether they are of a size that anything honest has."""

from __future__ import annotations

from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.pickles import Name, Opaque, Storage

MAX_NODES = 20_000_000
"""So many leaves and containers a tree may have, what is in several places counted as often. Pickles can promise more."""

MAX_DEPTH = 100


def without_opaque(tree: Any, key: str, where: str) -> tuple[Any, dict[str, str]]:
    """The tree without what is not made here, and of that the keys and why: items of dicts go alone, all else as a whole.

    ``key`` is that of the tree itself, which is Opaque as a whole if nothing of it stays.
    """
    refused: dict[str, str] = {}
    _check_size(tree, where)
    kept = _cleaned(tree, key, refused)
    return kept, refused


def _cleaned(node: Any, key: str, refused: dict[str, str]) -> Any:
    if type(node) is dict:
        kept = {}
        for name, item in node.items():
            inside = f"{key}.{name}" if key else str(name)
            if _is_opaque(name):
                refused[key] = "a dict with keys that are objects"
                return Opaque("")
            found = _cleaned(item, inside, refused)
            if not isinstance(found, Opaque):
                kept[name] = found
        return kept
    why = _why(node)
    if why:
        refused[key] = why
        return Opaque(why)
    return node


def _why(node: Any) -> str:
    """What in it is not made here; '' if all is."""
    if _is_opaque(node):
        return str(node.what) if isinstance(node, Opaque) else f"something that is named, {getattr(node, 'text', '')}"
    if isinstance(node, dict):
        return next(filter(None, map(_why, (*node.keys(), *node.values()))), "")
    if isinstance(node, list | tuple | set | frozenset):
        return next(filter(None, map(_why, node)), "")
    return ""


def _is_opaque(node: Any) -> bool:
    return isinstance(node, Opaque | Name | Storage)


def _check_size(tree: Any, where: str) -> None:
    """DamagedError for a tree that holds itself, or is too deep, or so large that it was made to hurt."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if not isinstance(node, dict | list | tuple | set | frozenset):
            return 1
        if id(node) in inside or depth > MAX_DEPTH:
            raise DamagedError(where, f"a tree that holds itself, or is deeper than {MAX_DEPTH} levels")
        if id(node) not in sizes:
            inside.add(id(node))
            items = (*node.keys(), *node.values()) if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(size(item, depth + 1) for item in items)
            inside.discard(id(node))
        return sizes[id(node)]

    if size(tree, 0) > MAX_NODES:
        raise DamagedError(where, f"a tree of more than {MAX_NODES:,} parts")
