"""What objects can be filled from: a committed checkpoint, or whatever else has keys, and tensors that are read in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distckpt.directory.elsewhere import require_shards
from distckpt.directory.locate import Located
from distckpt.errors import DamagedError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index import Index
from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.select import select_paths
from distckpt.format.tree.tree import Path, decode_path, unflatten
from distckpt.sharding.chunks import Piece, dtype_from_name
from distckpt.sharding.match import Wanted
from distckpt.state.tensors import Shelf, check_tensors, read_pieces, read_rectangles, read_tensors, read_values
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats

Targets = Mapping[str, Sequence[torch.Tensor]]
"""For each key the tensors that take what is stored; of a DTensor what this rank holds of it."""


class Stored(Protocol):
    """Tensors and plain values by key. Nothing of them is read before it is asked for."""

    @property
    def path(self) -> str:
        """What people call it."""

    @property
    def world_size(self) -> int:
        """How many ranks have written it."""

    @property
    def left_out(self) -> LeftOut | None:
        """What it lacks on purpose; None if that is nothing."""

    @property
    def texts(self) -> Mapping[str, str]:
        """Of every key its path as text, in the order in which they were written."""

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape, "json" and () for a plain value. KeyError if there is no such key."""

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """These plain values. DamagedError names file and key."""

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """Fill every target. DamagedError names file and key; the targets then hold anything."""

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """Do all that ``read`` does, but for filling the targets."""

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        """Fill each memory, as many bytes as it takes, with its rectangle of a tensor. Raises what ``read`` raises."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint."""

    where: Located
    index: Index

    @property
    def path(self) -> str:
        """See Stored."""
        return self.where.path

    @property
    def world_size(self) -> int:
        """See Stored."""
        return self.where.manifest.world_size

    @property
    def left_out(self) -> LeftOut | None:
        """See Stored."""
        return self.where.manifest.left_out

    @property
    def texts(self) -> Mapping[str, str]:
        """See Stored."""
        return dict(zip(self.index.names, self.index.paths, strict=True))

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """See Stored."""
        return self.index.layout(key)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """See Stored."""
        return read_values(self._shelf(), self.index, keys)

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored. Every byte has been checked on return."""
        return read_tensors(self._shelf(), self.index, targets, progress)

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored."""
        return check_tensors(self._shelf(), self.index, targets, progress)

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        """See Stored. Every byte has been checked on return."""
        read_rectangles(self._shelf(), self.index, wanted, memory)

    def read_pieces(self, parts: Iterable[tuple[str, Piece]]) -> ReadStats:
        """Fill parts of tensors, each with its key, as ``read`` fills what a rank holds of them."""
        return read_pieces(self._shelf(), self.index, parts)

    def _shelf(self) -> Shelf:
        require_shards(self.where)
        return Shelf(self.where.store, self.where.folder, self.where.path)


def load_leaves(stored: Stored, keys: Iterable[str]) -> dict[str, Any]:
    """These plain values, and tensors whole on the CPU, by key."""
    layouts = {key: stored.layout(key) for key in keys}
    tensors = {
        key: torch.empty(shape, dtype=dtype_from_name(dtype), device="cpu")
        for key, (dtype, shape) in layouts.items()
        if dtype != VALUE
    }
    values = stored.values(key for key in layouts if key not in tensors)
    stored.read({key: [tensor] for key, tensor in tensors.items()})
    return {**values, **tensors}


def load_tree(stored: Stored, select: str | Sequence[str] | None) -> Any:
    """The tree of it all, or what is below a place, or a dict from each of several to what is below it.

    KeyError, naming similar keys, if there is no such place.
    """
    texts, path = stored.texts, stored.path
    if select is None or isinstance(select, str):
        paths = (
            {key: decode_path(text, path) for key, text in texts.items()}
            if select is None
            else select_paths(texts, select, path, stored.left_out)
        )
        return _tree(path, paths, load_leaves(stored, paths))
    parts = {selector: select_paths(texts, selector, path, stored.left_out) for selector in select}
    leaves = load_leaves(stored, dict.fromkeys(key for paths in parts.values() for key in paths))
    return {selector: _tree(path, paths, leaves) for selector, paths in parts.items()}


def _tree(where: str, paths: Mapping[str, Path], leaves: Mapping[str, Any]) -> Any:
    try:
        return unflatten((path, leaves[key]) for key, path in paths.items())
    except ValueError as error:
        raise DamagedError(where, f"its keys do not make a tree: {error}") from error
