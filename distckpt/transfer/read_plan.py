"""From transfers to reads: which whole blocks of which shard, in the order in which they lie there.

Vectorized over transfers. A read covers whole blocks of one chunk, so that it can be checked by itself; large
transfers become several reads, so that threads can share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from distckpt.format.arrays import Ints
from distckpt.format.arrow.index import Index
from distckpt.sharding.match import Transfers, strides_of


class Scatter(NamedTuple):
    """How the needed elements of a read lie apart: arrays of ``shape``, of items of ``item`` bytes, strides in bytes.

    The first dimension is the one along which it may be done in parts.
    """

    item: int
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    def reach(self, count: int) -> int:
        """Bytes in the source from the first to the last element of that many steps along the first dimension."""
        steps = (count - 1, *(length - 1 for length in self.shape[1:]))
        return sum(step * stride for step, stride in zip(steps, self.source_strides, strict=True)) + self.item

    def inner(self) -> Scatter:
        """One step along the first dimension."""
        return Scatter(self.item, self.shape[1:], self.source_strides[1:], self.target_strides[1:])


class Read(NamedTuple):
    """Bytes ``begin`` to ``end`` of a shard are to be read: whole blocks of index row ``row``.

    Their CRC32C, carried on from ``before``, must be ``after``. Of them ``keep`` to ``keep_end`` go to ``target``
    in the memory of ``wanted``, as one run or as ``scatter`` says.
    """

    row: int
    wanted: int
    begin: int
    end: int
    keep: int
    keep_end: int
    target: int
    before: int
    after: int
    scatter: Scatter | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Reads of one shard, in order of position: what one thread does in one go."""

    rank: int
    shard: int
    reads: list[Read]


def plan_reads(index: Index, transfers: Transfers, batch_bytes: int) -> list[Batch]:
    """All reads that carry out the transfers, in batches of about ``batch_bytes``, in order of shard and position."""
    cuts = _cut(index, transfers, batch_bytes)
    order = np.lexsort((cuts.begin, index.shard[cuts.row], index.rank[cuts.row]))
    reads = _reads(transfers, cuts, order)
    return list(_batches(index, cuts, order, reads, batch_bytes))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """One element a read; see Read. ``transfer`` is which it is a part of, ``first`` and ``count`` its steps."""

    transfer: Ints
    row: Ints
    begin: Ints
    end: Ints
    keep: Ints
    keep_end: Ints
    target: Ints
    before: Ints
    after: Ints
    count: Ints
    source_strides: Ints
    target_strides: Ints
    leading: Ints
    item: Ints


@dataclass(frozen=True, slots=True)
class _Steps:
    """A transfer as steps along ``leading``, the first dimension in which it has more than one element.

    ``source`` and ``target`` are all strides in bytes, ``stride`` and ``target_stride`` those of a step, ``count`` the
    number of steps, ``origin`` where the row of the first step begins in the chunk.
    """

    leading: Ints
    source: Ints
    target: Ints
    stride: Ints
    target_stride: Ints
    count: Ints
    origin: Ints
    item: Ints


def _steps(index: Index, transfers: Transfers) -> _Steps:
    row, wanted = transfers.row, transfers.wanted
    item = np.where(index.item_sizes[index.key[row]] > 0, index.item_sizes[index.key[row]], index.size[row])
    source, target = strides_of(index.length[row], item), strides_of(transfers.wanted_length[wanted], item)
    leading: Ints = np.argmax(transfers.length > 1, axis=1)
    pair = np.arange(len(row))
    inner = np.arange(source.shape[1]) > leading[:, None]
    behind = ((transfers.start - index.offset[row]) * source * inner).sum(axis=1)
    return _Steps(
        leading=leading,
        source=source,
        target=target,
        stride=source[pair, leading],
        target_stride=target[pair, leading],
        count=transfers.length[pair, leading],
        origin=transfers.chunk_start - behind,
        item=item,
    )


def _cut(index: Index, transfers: Transfers, batch_bytes: int) -> _Cuts:
    steps = _steps(index, transfers)
    some = np.flatnonzero(transfers.nbytes)
    row, start, span = transfers.row, transfers.chunk_start, transfers.span
    block, size = index.block[row], index.size[row]
    first, last = start // block, (start + span - 1) // block + 1
    # A scattered transfer is cut only where a block ends with a step, so that no step is in two parts.
    can = transfers.direct | (block % np.maximum(steps.stride, 1) == 0)
    parts = np.where(can, np.clip(-(-(last - first) * block // batch_bytes), 1, last - first), 1)[some]
    of = np.repeat(some, parts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    blocks, parts = (last - first)[of], np.repeat(parts, parts)
    from_block, to_block = first[of] + number * blocks // parts, first[of] + (number + 1) * blocks // parts
    begin, end = from_block * block[of], np.minimum(to_block * block[of], size[of])

    direct, stride, count = transfers.direct[of], np.maximum(steps.stride[of], 1), steps.count[of]
    low = np.maximum(0, (begin - steps.origin[of]) // stride)
    high = np.minimum(count, -((steps.origin[of] - end) // stride))
    inner_span = span[of] - (count - 1) * stride
    keep = np.where(direct, np.maximum(start[of], begin), start[of] + low * stride)
    keep_end = np.where(direct, np.minimum((start + span)[of], end), start[of] + (high - 1) * stride + inner_span)
    moved = np.where(direct, keep - start[of], low * steps.target_stride[of])
    at, starts = index.position[row[of]], index.starts[row[of]]
    before = np.where(from_block > 0, index.blocks[starts + np.maximum(from_block, 1) - 1], 0)
    return _Cuts(
        transfer=of,
        row=row[of],
        begin=at + begin,
        end=at + end,
        keep=at + keep,
        keep_end=at + keep_end,
        target=transfers.wanted_start[of] + moved,
        before=before,
        after=index.blocks[starts + to_block - 1].astype(np.int64),
        count=high - low,
        source_strides=steps.source,
        target_strides=steps.target,
        leading=steps.leading,
        item=steps.item,
    )


def _reads(transfers: Transfers, cuts: _Cuts, order: Ints) -> list[Read]:
    wanted = transfers.wanted[cuts.transfer]
    columns = (cuts.row, wanted, cuts.begin, cuts.end, cuts.keep, cuts.keep_end, cuts.target, cuts.before, cuts.after)
    scatters: list[Scatter | None] = [None] * len(order)
    for place in np.flatnonzero(~transfers.direct[cuts.transfer[order]]).tolist():
        scatters[place] = _scatter(transfers, cuts, int(order[place]))
    return list(map(Read._make, zip(*(column[order].tolist() for column in columns), scatters, strict=True)))


def _scatter(transfers: Transfers, cuts: _Cuts, number: int) -> Scatter:
    transfer = int(cuts.transfer[number])
    leading = int(cuts.leading[transfer])
    return Scatter(
        item=int(cuts.item[transfer]),
        shape=(int(cuts.count[number]), *transfers.length[transfer, leading + 1 :].tolist()),
        source_strides=tuple(cuts.source_strides[transfer, leading:].tolist()),
        target_strides=tuple(cuts.target_strides[transfer, leading:].tolist()),
    )


def _batches(index: Index, cuts: _Cuts, order: Ints, reads: list[Read], batch_bytes: int) -> Iterator[Batch]:
    row = cuts.row[order]
    rank, shard = index.rank[row], index.shard[row]
    filled = np.cumsum((cuts.end - cuts.begin)[order]) // batch_bytes
    change = (np.diff(rank) != 0) | (np.diff(shard) != 0) | (np.diff(filled) != 0)
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(reads)]
    for first, last in pairwise(edges):
        if last > first:
            yield Batch(int(rank[first]), int(shard[first]), reads[first:last])
