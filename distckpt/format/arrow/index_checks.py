"""What must hold of the rows of an index, whoever made them. Vectorized: no Python object for a row that is in order.

Each check is a generator of findings, computed as they are asked for; sound rows yield nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distckpt.format.arrays import Bools, Crcs, Ints
from distckpt.format.limits import MAX_BYTES, MAX_SHARDS_OF_RANK, MAX_WORLD


@dataclass(frozen=True, slots=True)
class Finding:
    """Row ``row`` is wrong, and why."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where the bytes of each row are, one element a row; ``block`` is the size of its blocks in bytes."""

    rank: Ints
    shard: Ints
    position: Ints
    size: Ints
    block: Ints


@dataclass(frozen=True, slots=True)
class Blocks:
    """Running CRC32C at each block end: ``values[starts[i]:starts[i + 1]]`` are those of row i."""

    starts: Ints
    values: Crcs


@dataclass(frozen=True, slots=True)
class Boxes:
    """What each row holds of its tensor: [rows, dimensions] arrays, padded with offset 0, length 1, shape 1.

    ``item`` is the size of an element in bytes, 0 for a plain value.
    """

    ndim: Ints
    shape: Ints
    offset: Ints
    length: Ints
    item: Ints


def _first(bad: Bools, reason: str) -> Iterator[Finding]:
    row = int(np.argmax(bad)) if bad.size else 0
    if bad.size and bad[row]:
        yield Finding(row, reason)


def _first_of(bad: Bools, reason: str) -> Iterator[Finding]:
    """For [rows, dimensions]."""
    found: Bools = np.any(bad, axis=1)
    yield from _first(found, reason)


def check_bounds(rows: Places) -> Iterator[Finding]:
    """Every number is one that can exist. The other checks rely on it."""
    yield from _first((rows.rank < 0) | (rows.rank >= MAX_WORLD), "its rank is out of bounds")
    yield from _first((rows.shard < 0) | (rows.shard >= MAX_SHARDS_OF_RANK), "its shard is out of bounds")
    yield from _first((rows.position < 0) | (rows.position > MAX_BYTES), "its position is out of bounds")
    yield from _first((rows.size < 0) | (rows.size > MAX_BYTES), "its size is out of bounds")
    yield from _first((rows.block < 1) | (rows.block > MAX_BYTES), "its block size is out of bounds")


def check_wholes(key: Ints, boxes: Boxes, size: Ints) -> Iterator[Finding]:
    """The chunks of every tensor have as many bytes as the tensor: nobody makes room for more than there is."""
    stored = np.zeros(int(key.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(stored, key, size)
    about = boxes.shape.astype(np.float64).prod(axis=1) * boxes.item
    exact = boxes.shape.prod(axis=1, dtype=np.int64) * boxes.item
    wrong = (about > MAX_BYTES) | (exact != stored[key])
    yield from _first((boxes.item > 0) & wrong, "the chunks of its tensor are not as many bytes as the tensor")


def check_blocks(rows: Places, blocks: Blocks, crc32c: Crcs) -> Iterator[Finding]:
    """Every row has as many blocks as its size asks for, and the last running value is the row's own CRC32C."""
    yield from _first(np.diff(blocks.starts) != block_counts(rows), "its number of blocks is wrong")
    yield from _first(blocks.values[blocks.starts[1:] - 1] != crc32c, "its CRC32C is not that of its last block")


def block_counts(rows: Places) -> Ints:
    """How many blocks each row has: at least one."""
    counts: Ints = np.maximum(1, (rows.size - 1) // rows.block + 1)
    return counts


def check_overlaps(rows: Places) -> Iterator[Finding]:
    """No byte of a shard belongs to two rows."""
    some = np.flatnonzero(rows.size)
    shard = rows.rank[some] * MAX_SHARDS_OF_RANK + rows.shard[some]
    start, end = rows.position[some], rows.position[some] + rows.size[some]
    if not _in_order(shard, start):
        order = np.lexsort((start, shard))
        some, shard, start, end = some[order], shard[order], start[order], end[order]
    for found in _first((shard[1:] == shard[:-1]) & (start[1:] < end[:-1]), ""):
        yield Finding(int(some[found.row + 1]), "its bytes lie over those of another row of its shard")


def _in_order(major: Ints, minor: Ints) -> bool:
    step = np.diff(major)
    return bool(np.all((step > 0) | ((step == 0) & (np.diff(minor) >= 0))))


def check_inside(rows: Places, shard_sizes: Mapping[tuple[int, int], int]) -> Iterator[Finding]:
    """Every row lies inside one of the shards, given by (rank, shard) with sizes in bytes."""
    listed = np.array([rank * MAX_SHARDS_OF_RANK + shard for rank, shard in shard_sizes], dtype=np.int64)
    sizes = np.array(list(shard_sizes.values()), dtype=np.int64)
    order = np.argsort(listed)
    listed, sizes = listed[order], sizes[order]
    shard = rows.rank * MAX_SHARDS_OF_RANK + rows.shard
    at = np.searchsorted(listed, shard)
    known = at < len(listed)
    known[known] = listed[at[known]] == shard[known]
    yield from _first(~known, "its shard is not one of the checkpoint's")
    yield from _first(rows.position + rows.size > sizes[at], "its bytes lie outside its shard")


def check_boxes(boxes: Boxes, size: Ints) -> Iterator[Finding]:
    """Every chunk lies inside its tensor and has as many bytes as its elements take."""
    negative = (boxes.shape < 0) | (boxes.offset < 0) | (boxes.length < 0) | (boxes.shape > MAX_BYTES)
    yield from _first_of(negative, "shape, offset or length is out of bounds")
    outside = (boxes.offset > boxes.shape) | (boxes.length > boxes.shape - boxes.offset)
    yield from _first_of(outside, "its chunk lies outside the tensor")
    value = boxes.item == 0
    yield from _first(value & (boxes.ndim > 0), "a plain value with dimensions")
    with np.errstate(over="ignore", invalid="ignore"):
        whole = boxes.shape.prod(axis=1, dtype=np.float64) * boxes.item
    yield from _first(~(whole <= MAX_BYTES), "its tensor has more bytes than can exist")
    nbytes = boxes.length.prod(axis=1, dtype=np.int64) * boxes.item
    yield from _first(~value & (nbytes != size), "its size is not what its elements take")
