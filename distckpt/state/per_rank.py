"""State that belongs to one rank: any kind of object, kept apart from that of the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from distckpt.errors import ResizeError
from distckpt.format.tree.tree import Path, RankStep, flatten, key_of, unflatten
from distckpt.state.kind import Kind, Section, Surroundings
from distckpt.state.match import Match, Saved, Values, nothing_like
from distckpt.state.objects import PerRank, is_array


class PerRankState:
    """What a PerRank wraps, as a kind of its own below this rank's place: ``inner``."""

    def __init__(self, wrapper: PerRank, prefix: Path, around: Surroundings, inner: Kind) -> None:
        self._wrapper = wrapper
        self._prefix = prefix
        self._around = around
        self._inner = inner

    def sections(self) -> list[Section]:
        """Those of the object inside."""
        return list(self._inner.sections())

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Those of the object inside."""
        return self._inner.parameters()

    def match(self, match: Match, saved: Saved) -> None:
        """This rank's own state, as long as there are as many ranks as before; else ``on_resize`` decides."""
        name, decide = key_of(self._prefix), self._wrapper.on_resize
        if not saved and match.asks_all(name):
            match.lacks([name])
        elif not saved:
            self._inner.match(match, saved.below(RankStep(self._around.rank)))
        elif saved.world_size == self._around.world_size:
            # An older checkpoint may be of other ranks, and leave what is here as it is.
            with match.aside() if decide == "drop" else nullcontext():
                self._inner.match(match, saved.below(RankStep(self._around.rank)))
        elif decide == "error":
            raise ResizeError(name, saved.world_size, self._around.world_size)
        else:
            match.claim(saved)
            if callable(decide):
                self._resize(match, saved, decide)

    def put(self, tree: Any) -> None:
        """Take it."""
        self._inner.put(tree)

    def _resize(self, match: Match, saved: Saved, decide: Callable[[list[Any], int, int], Any]) -> None:
        makers = [match.tree(part, {}, nothing_like) for _, part in sorted(saved.of_ranks().items())]

        def put(values: Values) -> None:
            choices = [make(values) for make in makers]
            tree = decide(choices, self._around.rank, self._around.world_size)
            self._inner.put(tree if match.asks_all(key_of(self._prefix)) else self._with_unasked(match, tree))

        match.afterwards(put)

    def _with_unasked(self, match: Match, tree: Any) -> Any:
        """What is to be taken, and beside it what is here and is not to be restored."""
        depth = len(self._prefix) + 1
        here = [
            leaf for section in self._inner.sections() for leaf in flatten(section.read(), is_array, section.prefix)
        ]
        kept = {leaf.path[depth:]: leaf.value for leaf in here if not match.asks(leaf.key)}
        taken = {leaf.path: leaf.value for leaf in flatten(tree, is_array)}
        return unflatten({**taken, **kept, **taken}.items())
