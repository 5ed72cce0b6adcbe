"""Which stored bytes fill the rectangles that a process wants: every wanted rectangle against every chunk of its key.

Vectorized over pairs; what comes out are arrays with one element for each pair that has bytes in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.format.arrays import Bools, Ints
from distckpt.format.arrow.index import Index
from distckpt.sharding.coverage import Boxes, find_overlap


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
    """What to copy from where to where, in order of ``wanted`` number; P parts that a chunk and a rectangle share.

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


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What a chunk and a wanted rectangle have in common: see Transfers. ``item`` is an element's size in bytes."""

    number: Ints
    row: Ints
    low: Ints
    length: Ints
    item: Ints


def match(index: Index, wanted: Sequence[Wanted]) -> Transfers:
    """Every transfer that fills the wanted rectangles, and which of them cannot be filled.

    A rectangle of a key that the index lacks, of other dimensions, or beyond the tensor counts as uncovered.
    """
    asked = _arrays(index, wanted)
    whole = _pairs(index, asked)
    uncovered = _uncovered(asked, whole)
    pairs = _taken_apart(index, asked, whole)
    chunk, rectangle = index.length[pairs.row], asked.length[pairs.number]
    chunk_start, span = _reach(pairs.low - index.offset[pairs.row], pairs.length, chunk, pairs.item)
    wanted_start, _ = _reach(pairs.low - asked.offset[pairs.number], pairs.length, rectangle, pairs.item)
    return Transfers(
        keys=tuple(one.key for one in wanted),
        wanted_offset=asked.offset,
        wanted_length=asked.length,
        wanted_nbytes=_wanted_nbytes(index, asked),
        uncovered=uncovered,
        row=pairs.row,
        wanted=pairs.number,
        start=pairs.low,
        length=pairs.length,
        direct=_direct(index, asked, pairs),
        chunk_start=chunk_start,
        span=span,
        wanted_start=wanted_start,
        nbytes=pairs.length.prod(axis=1, dtype=np.int64) * pairs.item,
    )


def _arrays(index: Index, wanted: Sequence[Wanted]) -> _Asked:
    if any(len(one.offset) != len(one.length) for one in wanted):
        raise ValueError("a wanted rectangle has an offset and a length of different dimensions")
    key = np.array([_key_of(index, one) for one in wanted], dtype=np.int64)
    known = np.flatnonzero(key >= 0)
    rectangles = [wanted[number] for number in known.tolist()]
    offset = np.zeros((len(key), index.shapes.shape[1]), dtype=np.int64)
    length = np.ones_like(offset)
    offset[known] = _padded([one.offset for one in rectangles], offset.shape[1], 0)
    length[known] = _padded([one.length for one in rectangles], offset.shape[1], 1)
    if np.any(offset < 0) or np.any(length < 0):
        raise ValueError("a wanted rectangle has a negative offset or length")
    shape = index.shapes[key[known]]
    beyond = np.any((offset[known] > shape) | (length[known] > shape - offset[known]), axis=1)
    key[known[beyond]] = -1
    return _Asked(key, offset, length)


def _key_of(index: Index, one: Wanted) -> int:
    number = index.ids.get(one.key, -1)
    return number if number >= 0 and index.ndims[number] == len(one.offset) else -1


def _padded(tuples: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    out: Ints = np.full((len(tuples), width), fill, dtype=np.int64)
    ndim = np.array([len(one) for one in tuples], dtype=np.int64)
    out[np.arange(width) < ndim[:, None]] = [number for one in tuples for number in one]
    return out


def _pairs(index: Index, asked: _Asked) -> _Pairs:
    """All pairs that have elements in common, in order of wanted number and then row."""
    number, row = _of_one_key(index, asked)
    low = np.maximum(index.offset[row], asked.offset[number])
    length = np.minimum(index.offset[row] + index.length[row], asked.offset[number] + asked.length[number]) - low
    common = np.all(length > 0, axis=1)
    row = row[common]
    item = index.item_sizes[index.key[row]]
    return _Pairs(number[common], row, low[common], length[common], np.where(item > 0, item, index.size[row]))


def _of_one_key(index: Index, asked: _Asked) -> tuple[Ints, Ints]:
    """Wanted number and row of every chunk of the same key."""
    if not len(index):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    first = index.groups[asked.key]
    count = np.where(asked.key >= 0, index.groups[asked.key + 1] - first, 0)
    number, within = _repeated(count)
    return number, index.grouped[first[number] + within]


def _repeated(count: Ints) -> tuple[Ints, Ints]:
    """Each position ``count`` times, and for each of them which time it is, from 0."""
    position = np.repeat(np.arange(len(count)), count)
    return position, np.arange(len(position)) - np.repeat(np.cumsum(count) - count, count)


def _taken_apart(index: Index, asked: _Asked, pairs: _Pairs) -> _Pairs:
    """Step by step along the first dimension where blocks allow it: where whole blocks between two steps are not
    wanted, and where every step ends with a block. Otherwise whole chunks would have to be read for parts of them."""
    while True:
        leading = np.argmax(pairs.length > 1, axis=1)
        count, stride, reach = _steps(index, pairs, leading)
        block = index.block[pairs.row]
        apart = (stride - reach >= 2 * block) | ((stride > block) & (stride % block == 0))
        apart &= (count > 1) & ~_direct(index, asked, pairs)
        if not apart.any():
            return pairs
        of, step = _repeated(np.where(apart, count, 1))
        low, length, leading = pairs.low[of], pairs.length[of], leading[of]
        low[np.arange(len(of)), leading] += step
        length[np.flatnonzero(apart[of]), leading[apart[of]]] = 1
        pairs = _Pairs(pairs.number[of], pairs.row[of], low, length, pairs.item[of])


def _steps(index: Index, pairs: _Pairs, leading: Ints) -> tuple[Ints, Ints, Ints]:
    """How many steps along ``leading``, bytes in the chunk from one to the next, and bytes that one reaches over."""
    each = np.arange(len(leading))
    strides = strides_of(index.length[pairs.row], pairs.item)
    count, stride = pairs.length[each, leading], strides[each, leading]
    reach = ((pairs.length - 1) * strides).sum(axis=1) + pairs.item - (count - 1) * stride
    return count, stride, reach


def _direct(index: Index, asked: _Asked, pairs: _Pairs) -> Bools:
    in_chunk = _one_run(pairs.length, index.length[pairs.row])
    direct: Bools = in_chunk & _one_run(pairs.length, asked.length[pairs.number])
    return direct


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
    nbytes = np.zeros(len(asked.key), dtype=np.int64)
    known = np.flatnonzero(asked.key >= 0)
    key = asked.key[known]
    item, value_size = index.item_sizes[key], index.size[index.grouped[index.groups[key]]]
    nbytes[known] = asked.length[known].prod(axis=1, dtype=np.int64) * np.where(item > 0, item, value_size)
    return nbytes


def _uncovered(asked: _Asked, pairs: _Pairs) -> tuple[int, ...]:
    """As much volume as wanted, and no two parts over each other: then every element comes exactly once."""
    number, low, high = pairs.number, pairs.low, pairs.low + pairs.length
    filled = np.zeros(len(asked.key), dtype=np.int64)
    np.add.at(filled, number, pairs.length.prod(axis=1, dtype=np.int64))
    bad = (asked.key < 0) | (filled != asked.length.prod(axis=1, dtype=np.int64))
    several = np.bincount(number, minlength=len(filled)) > 1
    while True:
        suspects = np.flatnonzero(several[number] & ~bad[number])
        pair = find_overlap(Boxes(number[suspects], list(low[suspects].T), list(high[suspects].T)))
        if pair is None:
            return tuple(np.flatnonzero(bad).tolist())
        bad[number[suspects[pair[0]]]] = True
