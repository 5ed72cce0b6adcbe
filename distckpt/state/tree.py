"""Nested containers of tensors and plain values, and single ones: they take the shape that was saved."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from distckpt.format.tree.tree import Leaf, Path, flatten
from distckpt.state.kind import Place, Section
from distckpt.state.match import Match, Saved
from distckpt.state.memory import writable
from distckpt.state.objects import is_array
from distckpt.state.pouring import Poured, poured


class TreeState:
    """A tree as it stands. Arrays are filled where they are, and mutable containers keep their identity.

    ``declared`` is where it had leaves when it was given to its checkpoint. What the checkpoint lacks of those is
    missing; other plain values came up in training, and go when a checkpoint from before that is restored.
    """

    def __init__(self, place: Place, declared: Collection[Path]) -> None:
        self._place = place
        self._declared = declared

    def sections(self) -> list[Section]:
        """One. Read at every save: values change, and containers grow."""
        return [Section(self._place.prefix, self._place.get, packs=True)]

    def parameters(self) -> tuple[()]:
        """None that anybody could tell from other tensors."""
        return ()

    def paths(self) -> dict[str, Path]:
        """Of each leaf that it has, by its key."""
        return {leaf.key: leaf.path for leaf in flatten(self._place.get(), is_array, self._place.prefix)}

    def match(self, match: Match, saved: Saved) -> None:
        """Arrays that are here must be there, with their shape; plain values and containers take what was saved."""
        leaves = flatten(self._place.get(), is_array, self._place.prefix)
        current = {leaf.key: leaf.value for leaf in leaves}
        others = [leaf for leaf in leaves if leaf.key not in saved]
        inside, whole = _places(saved) if others else (set(), set())
        missed = [leaf for leaf in others if match.asks(leaf.key) and self._is_missed(leaf, inside, whole)]
        match.lacks(leaf.key for leaf in missed)
        if not saved:
            return
        missed += match.unasked(others, saved)
        in_place = {key: value for key, value in current.items() if _stays(key, value, saved)}

        def like(key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
            value = current.get(key)
            return value if isinstance(value, torch.Tensor) else None

        depth = len(self._place.prefix)
        make = match.tree(saved, in_place, like, [(leaf.path[depth:], leaf.value) for leaf in missed])
        match.afterwards(lambda values: self._take(make(values), match.poured))

    def put(self, tree: Any) -> None:
        """Take it, into the containers that are there."""
        self._take(tree, {})

    def _take(self, tree: Any, before: Poured) -> None:
        self._place.replace(poured(self._place.get(), tree, before))

    def _is_missed(self, leaf: Leaf, inside: set[Path], whole: set[Path]) -> bool:
        if leaf.path in inside or any(leaf.path[:at] in whole for at in range(len(leaf.path) + 1)):
            return False  # what is one value here is a container there, or the other way round
        is_declared = leaf.path[len(self._place.prefix) :] in self._declared
        return is_array(leaf.value) or (is_declared and not _is_empty(leaf.value))


def _places(saved: Saved) -> tuple[set[Path], set[Path]]:
    """Where what was saved has containers, and where it has leaves."""
    whole = set(saved.paths.values())
    return {path[:at] for path in whole for at in range(len(saved.prefix), len(path))}, whole


def _stays(key: str, value: Any, saved: Saved) -> bool:
    """Whether the saved tensor is to be read into the array that is here; one without elements takes any shape."""
    return (
        is_array(value) and key in saved and not saved.is_value(key) and math.prod(value.shape) > 0 and writable(value)
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list | tuple | set) and not value)
