"""Anything with ``state_dict`` and ``load_state_dict``: what the one gave is what the other gets, all of it."""

from __future__ import annotations

from typing import Any

import torch

from distckpt.format.tree.tree import Leaf, Path, flatten, key_of
from distckpt.state.kind import Section
from distckpt.state.match import Match, Saved
from distckpt.state.objects import is_array


class StatefulState:
    """A scheduler, a loader, a metric ... Nothing is known of it, so it is read at every save."""

    def __init__(self, obj: Any, prefix: Path) -> None:
        self._obj = obj
        self._prefix = prefix

    def sections(self) -> list[Section]:
        """One."""
        return [Section(self._prefix, lambda: self._obj.state_dict(), packs=True)]  # the method that it has then

    def parameters(self) -> tuple[()]:
        """None that anybody could tell from other tensors."""
        return ()

    def match(self, match: Match, saved: Saved) -> None:
        """It takes whatever was saved, also what is not asked for, in new memory, laid out over ranks as what it holds."""
        leaves = [] if match.asks_all(key_of(self._prefix)) else self._leaves()
        if not saved:
            if not leaves or any(match.asks(leaf.key) for leaf in leaves):
                match.lacks([key_of(self._prefix)])
            return
        depth = len(self._prefix)
        kept = [(leaf.path[depth:], leaf.value) for leaf in match.unasked(leaves, saved)]
        make = match.tree(saved, {}, self._like(), kept)
        match.afterwards(lambda values: self.put(make(values)))

    def put(self, tree: Any) -> None:
        """Load it."""
        self._obj.load_state_dict(tree)

    def _like(self) -> Any:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return lambda key, shape: None
        live = {leaf.key: leaf.value for leaf in self._leaves() if isinstance(leaf.value, torch.Tensor)}
        return lambda key, shape: live.get(key)

    def _leaves(self) -> list[Leaf]:
        return flatten(self._obj.state_dict(), is_array, self._prefix)
