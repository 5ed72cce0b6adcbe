"""A file in the making: texts and tensors one after the other, read a part at a time and handed on as sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.sharding.match import Wanted
from distckpt.state.stored import Stored

SECTION = 32 << 20
"""About what is read at a time, while what was read before is written."""

_MULTIPLE = 1 << 20
"""Stores take sections of whole MiB, but for the last."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """A tensor on its way into a file: its ``key`` in what it is read from, and its ``name`` in the file."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


Text = Callable[[], bytes]
"""Bytes that are asked for when all that comes before them has been read."""

Part = bytes | Text | Streamed

Seen = Callable[[Streamed, memoryview], object]
"""Is shown the bytes of each tensor in order, perhaps in several parts."""


def sections(parts: Iterable[Part], stored: Stored, seen: Seen) -> Iterator[memoryview]:
    """The bytes of all parts in order, as a store takes them. Raises what ``stored.fill`` raises."""
    rest = memoryview(b"")
    for batch in _batches(parts):
        size = rest.nbytes + sum(piece.nbytes for piece in batch)
        content = np.empty(size, dtype=np.uint8).data
        content[: rest.nbytes] = rest
        _fill(content[rest.nbytes :], batch, stored, seen)
        whole = size // _MULTIPLE * _MULTIPLE
        if whole:
            yield content[:whole]
        rest = memoryview(bytes(content[whole:]))
    if rest.nbytes:
        yield rest


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of the first dimension of a tensor, or a text of that size."""

    nbytes: int
    text: bytes = b""
    tensor: Streamed | None = None
    first: int = 0
    count: int = 0

    @property
    def wanted(self) -> Wanted:
        assert self.tensor is not None
        shape = self.tensor.shape
        if not shape:
            return Wanted(self.tensor.key, (), ())
        return Wanted(self.tensor.key, (self.first, *(0,) * (len(shape) - 1)), (self.count, *shape[1:]))


def _fill(content: memoryview, batch: list[_Piece], stored: Stored, seen: Seen) -> None:
    position = 0
    wanted: list[tuple[_Piece, memoryview]] = []
    for piece in batch:
        view = content[position : position + piece.nbytes]
        position += piece.nbytes
        if piece.tensor is None:
            view[:] = piece.text
        elif piece.nbytes:
            wanted.append((piece, view))
    stored.fill([piece.wanted for piece, _ in wanted], [view for _, view in wanted])
    for piece, view in wanted:
        assert piece.tensor is not None
        seen(piece.tensor, view)


def _batches(parts: Iterable[Part]) -> Iterator[list[_Piece]]:
    """What is read together: as many pieces as make a section."""
    batch: list[_Piece] = []
    size = 0
    for part in parts:
        if callable(part):
            yield batch  # so that all before it has been read
            batch, size = [], 0
        for piece in _pieces(part):
            batch.append(piece)
            size += piece.nbytes
            if size >= SECTION:
                yield batch
                batch, size = [], 0
    yield batch


def _pieces(part: Part) -> Iterator[_Piece]:
    if isinstance(part, Streamed):
        rows = part.shape[0] if part.shape else 1
        at_once = max(1, SECTION * rows // max(1, part.nbytes))
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            yield _Piece(part.nbytes // rows * count, b"", part, first, count)
        return
    text = part() if callable(part) else part
    yield _Piece(len(text), text)
