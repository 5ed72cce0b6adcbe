"""Which stored bytes fill the rectangles that a process wants: every wanted rectangle against every chunk of its key.

Vectorized over pairs; what comes out are arrays with one element for each pair that has bytes in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.format.index import Index
from distckpt.sharding.coverage import Boxes, find_overlap

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A rectangle of one tensor, or a plain value with offset and length ``()``.

    Its memory is laid out row-major: the product of ``length`` elements, or as many bytes as the value has.
    """

    key: str
    offset: tuple[int, ...]
    length: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Transfers:
    """What to copy from where to where, in order of ``wanted`` number; P pairs of a chunk and a wanted rectangle.

    ``row`` is the chunk's row in the index. ``start[p]`` and ``length[p]`` [P, D] are the intersection in the
    tensor's coordinates. Where ``direct``, it is one run of bytes on both sides: ``nbytes`` from ``chunk_start`` in
    the chunk to ``wanted_start`` in the wanted memory. Elsewhere it lies in the ``span`` bytes from ``chunk_start``
    on, and is to be copied element by element. A direct one's span is its ``nbytes``.

    ``wanted_nbytes`` has the size of each wanted rectangle in bytes, and ``wanted_offset`` and ``wanted_length``
    [W, D] where it is. ``uncovered`` are the numbers of those that the chunks do not cover exactly once.
    """

    keys: tuple[str, ...]
    wanted_offset: Ints
    wanted_length: Ints
    wanted_nbytes: Ints
    uncovered: tuple[int, ...]
    row: Ints
    wanted: Ints
    start: Ints
    length: Ints
    direct: Bools
    chunk_start: Ints
    span: Ints
    wanted_start: Ints
    nbytes: Ints

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The wanted rectangles as arrays: ``key`` is the id, -1 if the index lacks it or it does not fit the tensor."""

    key: Ints
    offset: Ints
    length: Ints


def match(index: Index, wanted: Sequence[Wanted]) -> Transfers:
    """Every transfer that fills the wanted rectangles, and which of them cannot be filled.

    A rectangle of a key that the index lacks, of other dimensions, or beyond the tensor counts as uncovered.
    """
    asked = _arrays(index, wanted)
    number, row = _pairs(index, asked)
    low = np.maximum(index.offset[row], asked.offset[number])
    high = np.minimum(index.offset[row] + index.length[row], asked.offset[number] + asked.length[number])
    common = np.all(high > low, axis=1)
    number, row, low = number[common], row[common], low[common]
    length = high[common] - low
    item = np.where(index.item_sizes[index.key[row]] > 0, index.item_sizes[index.key[row]], index.size[row])
    chunk, rectangle = index.length[row], asked.length[number]
    direct = _one_run(length, chunk) & _one_run(length, rectangle)
    chunk_start, span = _reach(low - index.offset[row], length, chunk, item)
    wanted_start, _ = _reach(low - asked.offset[number], length, rectangle, item)
    volume = length.prod(axis=1, dtype=np.int64)
    nbytes = volume * item
    return Transfers(
        keys=tuple(one.key for one in wanted),
        wanted_offset=asked.offset,
        wanted_length=asked.length,
        wanted_nbytes=_wanted_nbytes(index, asked),
        uncovered=_uncovered(asked, number, low, length, volume),
        row=row,
        wanted=number,
        start=low,
        length=length,
        direct=direct,
        chunk_start=chunk_start,
        span=span,
        wanted_start=wanted_start,
        nbytes=nbytes,
    )


def _arrays(index: Index, wanted: Sequence[Wanted]) -> _Asked:
    if any(len(one.offset) != len(one.length) for one in wanted):
        raise ValueError("a wanted rectangle has an offset and a length of different dimensions")
    fits = [index.ids.get(one.key, -1) for one in wanted]
    ndims = index.ndims.tolist()
    fits = [
        number if number >= 0 and ndims[number] == len(one.offset) else -1
        for number, one in zip(fits, wanted, strict=True)
    ]
    key = np.array(fits, dtype=np.int64)
    known = [one for one, number in zip(wanted, fits, strict=True) if number >= 0]
    ndim = np.array([len(one.offset) for one in known], dtype=np.int64)
    offset = np.zeros((len(key), index.shapes.shape[1]), dtype=np.int64)
    length = np.ones_like(offset)
    offset[key >= 0] = _padded([one.offset for one in known], ndim, offset.shape[1], 0)
    length[key >= 0] = _padded([one.length for one in known], ndim, offset.shape[1], 1)
    if np.any(offset < 0) or np.any(length < 0):
        raise ValueError("a wanted rectangle has a negative offset or length")
    shape = index.shapes[key[key >= 0]]
    beyond = np.zeros(len(key), dtype=np.bool_)
    beyond[key >= 0] = np.any((offset[key >= 0] > shape) | (length[key >= 0] > shape - offset[key >= 0]), axis=1)
    key[beyond] = -1
    return _Asked(key, offset, length)


def _padded(tuples: Sequence[tuple[int, ...]], ndim: Ints, width: int, fill: int) -> Ints:
    out: Ints = np.full((len(tuples), width), fill, dtype=np.int64)
    out[np.arange(width) < ndim[:, None]] = [number for one in tuples for number in one]
    return out


def _pairs(index: Index, asked: _Asked) -> tuple[Ints, Ints]:
    """Wanted number and row of all pairs that share a key, in order of wanted number and then row."""
    if not len(index):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    first = index.groups[asked.key]
    count = np.where(asked.key >= 0, index.groups[asked.key + 1] - first, 0)
    number: Ints = np.repeat(np.arange(len(count)), count)
    ends = np.cumsum(count)
    within = np.arange(len(number)) - np.repeat(ends - count, count)
    return number, index.grouped[np.repeat(first, count) + within]


def _one_run(length: Ints, box: Ints) -> Bools:
    """Whether a part of that length is one run of the box in row-major order, wherever in the box it lies."""
    several = np.logical_or.accumulate(length > 1, axis=1)
    broken = several[:, :-1] & (length[:, 1:] != box[:, 1:])
    whole: Bools = ~broken.any(axis=1)
    return whole


def _reach(offset: Ints, length: Ints, box: Ints, item: Ints) -> tuple[Ints, Ints]:
    """First byte of a part within its box, and how many bytes lie from there to its last."""
    strides = strides_of(box, item)
    start: Ints = (offset * strides).sum(axis=1)
    span: Ints = ((length - 1) * strides).sum(axis=1) + item
    return start, span


def strides_of(box: Ints, item: Ints) -> Ints:
    """Row-major strides in bytes of [N, D] boxes whose elements have ``item`` bytes."""
    strides = np.empty(box.shape, dtype=np.int64)
    step = item
    for dimension in range(box.shape[1] - 1, -1, -1):
        strides[:, dimension] = step
        step = step * box[:, dimension]
    return strides


def _wanted_nbytes(index: Index, asked: _Asked) -> Ints:
    """Size in bytes of every wanted rectangle; 0 for those that the index knows nothing of."""
    if not len(index):
        return np.zeros(len(asked.key), dtype=np.int64)
    item = index.item_sizes[asked.key]
    value_size = index.size[index.grouped[index.groups[asked.key]]]
    volume = asked.length.prod(axis=1, dtype=np.int64)
    nbytes: Ints = np.where(asked.key >= 0, volume * np.where(item > 0, item, value_size), 0)
    return nbytes


def _uncovered(asked: _Asked, number: Ints, low: Ints, length: Ints, volume: Ints) -> tuple[int, ...]:
    """As much volume as wanted, and no two parts over each other: then every element comes exactly once."""
    filled = np.zeros(len(asked.key), dtype=np.int64)
    np.add.at(filled, number, volume)
    bad = (asked.key < 0) | (filled != asked.length.prod(axis=1, dtype=np.int64))
    several = np.bincount(number, minlength=len(filled)) > 1
    while True:
        suspects = np.flatnonzero(several[number] & ~bad[number])
        pair = find_overlap(Boxes(number[suspects], list(low[suspects].T), list((low + length)[suspects].T)))
        if pair is None:
            return tuple(np.flatnonzero(bad).tolist())
        bad[number[suspects[pair[0]]]] = True
