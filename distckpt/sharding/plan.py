"""Who writes what: every distinct chunk is written by exactly one of the ranks that hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from distckpt.errors import PlanError
from distckpt.format.arrays import Ints
from distckpt.format.arrow.columns import column_of, numbers_of
from distckpt.sharding.balance import spread
from distckpt.sharding.checks import Chunks, checked_chunks, told
from distckpt.sharding.merged import Codes, Merged, encode_slices, merge
from distckpt.sharding.omission import agreed, with_left_out

# What a row costs to write beside its own bytes. It also spreads plain values, which count no bytes.
_ROW_COST = 512
_STRUCTURE_CHANGED = (
    "the structure changed on some ranks only, after others had copied their part by the plan before. "
    "Nothing was written; the next save plans afresh and will succeed"
)


@dataclass(frozen=True, slots=True, eq=False)
class ShardingPlan:
    """Which rows of its description each rank writes. Satisfies ``coordinator.actions.Plan``.

    ``table`` has one row a distinct chunk (key, path, dtype, shape, offset, length, rank, nbytes), ordered by the rank
    that writes it and then by that rank's order of writing. ``nbytes`` is 0 for plain values. Its
    metadata say what is left out.
    """

    plan_id: str
    world_size: int
    table: pa.Table = field(repr=False)
    _rows: Codes = field(repr=False)
    _starts: Ints = field(repr=False)

    def rows(self, rank: int) -> bytes:
        """Rows of the rank's description that it writes, ascending: int32, little endian."""
        return self._rows[self._span(rank)].astype("<i4").tobytes()

    def row_count(self, rank: int) -> int:
        """How many rows that is."""
        span = self._span(rank)
        return int(span.stop - span.start)

    def _span(self, rank: int) -> slice:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"the plan covers ranks 0 to {self.world_size - 1}, not {rank}")
        return slice(int(self._starts[rank]), int(self._starts[rank + 1]))


def make_plan(
    number: int | None,
    descriptions: Mapping[int, bytes],
    staged: Mapping[int, bytes] | None = None,
    fresh: Collection[int] | None = None,
) -> ShardingPlan:
    """Plan the writing of what ranks 0, 1, 2 ... described, balanced by bytes; the same input gives the same plan.

    ``staged`` names ranks that have copied rows already (int32, little endian): they write exactly those. ``fresh``
    names those that described what they hold just now, None meaning all: values are compared between them. PlanError,
    about checkpoint ``number``, for a hole, an overlap, ranks that disagree, staged rows that do not fit, and an exclusion
    of keys that no rank has.
    """
    merged = merge(number, descriptions)
    chunks = checked_chunks(number, merged, fresh)
    left_out = (
        agreed(number, merged.omissions, [str(key) for key in merged.keys.to_pylist()])
        if any(merged.omissions)
        else None
    )
    owner = _keep_staged(number, merged, chunks, staged or {})
    _assign(number, merged, chunks, owner, np.array(sorted(staged or {}), np.int32))
    written = np.flatnonzero(merged.rank == owner[chunks.of_row])
    return ShardingPlan(
        plan_id=hashlib.sha256(merged.fingerprint() + written.astype("<i8").tobytes()).hexdigest(),
        world_size=merged.world_size,
        table=with_left_out(_table(merged, written), left_out),
        _rows=(written - merged.first[merged.rank[written]]).astype(np.int32),
        _starts=np.searchsorted(written, merged.first),
    )


def _keep_staged(number: int | None, merged: Merged, chunks: Chunks, staged: Mapping[int, bytes]) -> Ints:
    """The writer of each chunk that is staged already, -1 for all others."""
    owner = np.full(len(chunks.first), -1, np.int64)
    for rank in sorted(staged):
        rows = _staged_rows(number, merged, rank, staged[rank])
        taken = np.flatnonzero(owner[chunks.of_row[rows]] >= 0)
        if len(taken):
            row = int(rows[taken[0]])
            message = f"{merged.rectangle_text(row)} was copied by both: {_STRUCTURE_CHANGED}"
            raise PlanError(number, merged.key_text(row), [int(owner[chunks.of_row[row]]), rank], message)
        owner[chunks.of_row[rows]] = rank
    return owner


def _staged_rows(number: int | None, merged: Merged, rank: int, staged: bytes) -> Ints:
    """Rows of ``merged`` that a rank has copied."""
    if not 0 <= rank < merged.world_size:
        raise ValueError(f"rank {rank} staged, but there are {merged.world_size} ranks")
    held = int(merged.first[rank + 1] - merged.first[rank])
    rows = np.frombuffer(staged[: len(staged) // 4 * 4], "<i4").astype(np.int64)
    if len(staged) % 4 or len(np.unique(rows)) < len(rows) or np.any((rows < 0) | (rows >= held)):
        message = f"the rows that it copied are not distinct rows of the {held} that it describes"
        raise PlanError(number, "what it copied", [rank], message)
    return rows + int(merged.first[rank])


def _assign(number: int | None, merged: Merged, chunks: Chunks, owner: Ints, closed: Codes) -> None:
    """Give every chunk that has no writer one of its holders, except the ``closed`` ones, which take no more."""
    is_closed = np.zeros(merged.world_size, np.bool_)
    is_closed[closed] = True
    open_rows = chunks.rows[(owner[chunks.of_row[chunks.rows]] < 0) & ~is_closed[merged.rank[chunks.rows]]]
    open_rows = _without_followers(merged, chunks, open_rows)
    holders = np.bincount(chunks.of_row[open_rows], minlength=len(owner))
    _check_writable(number, merged, chunks, np.flatnonzero((owner < 0) & (holders == 0)))
    cost = merged.nbytes[chunks.first] + _ROW_COST
    load = np.zeros(merged.world_size, np.int64)
    alone = open_rows[holders[chunks.of_row[open_rows]] == 1]
    owner[chunks.of_row[alone]] = merged.rank[alone]
    np.add.at(load, merged.rank[alone], cost[chunks.of_row[alone]])
    shared = open_rows[holders[chunks.of_row[open_rows]] > 1]
    for ranks, members in _by_holders(merged.rank[shared], chunks.of_row[shared]):
        taken = ranks[spread(cost[members], load[ranks])]
        owner[members] = taken
        np.add.at(load, taken, cost[members])


def _without_followers(merged: Merged, chunks: Chunks, rows: Ints) -> Ints:
    """``rows``, which come by chunk and by rank in a chunk, but of every led chunk only that of the lowest rank."""
    is_first = np.diff(chunks.of_row[rows], prepend=-1) != 0
    kept: Ints = rows[is_first | ~merged.led[rows]]
    return kept


def _check_writable(number: int | None, merged: Merged, chunks: Chunks, orphans: Ints) -> None:
    if len(orphans):
        rows = chunks.rows_of(int(orphans[0]))
        ranks = merged.ranks_of(rows)
        message = f"{told(ranks)} alone could write {merged.rectangle_text(rows[0])}, but did not copy it: "
        raise PlanError(number, merged.key_text(rows[0]), ranks, message + _STRUCTURE_CHANGED)


def _by_holders(ranks: Codes, chunk: Ints) -> list[tuple[Codes, Ints]]:
    """Chunks with the same holders together, fewest holders first. Rows must come by chunk, and by rank in a chunk."""
    if len(chunk) == 0:
        return []
    starts = np.flatnonzero(np.diff(chunk, prepend=-1))
    sets: Any = encode_slices(np.append(starts, len(chunk)), ranks)
    codes = numbers_of(sets.indices)
    order = np.argsort(codes, kind="stable")
    groups = np.split(chunk[starts][order], np.flatnonzero(np.diff(codes[order])) + 1)
    holders = [np.frombuffer(item.as_buffer(), np.int32) for item in sets.dictionary]
    return sorted(zip(holders, groups, strict=True), key=lambda pair: len(pair[0]))


def _table(merged: Merged, rows: Ints) -> pa.Table:
    def texts(codes: Codes, dictionary: pa.Array[Any]) -> pa.DictionaryArray[Any, Any]:
        return pa.DictionaryArray.from_arrays(column_of(codes[rows], pa.int32()), dictionary)

    return pa.table(
        {
            "key": texts(merged.key, merged.keys),
            "path": texts(merged.path, merged.paths),
            "dtype": texts(merged.dtype, merged.dtypes),
            "shape": merged.shapes.take(merged.shape[rows]),
            "offset": merged.offsets.take(merged.offset[rows]),
            "length": merged.lengths.take(merged.length[rows]),
            "rank": column_of(merged.rank[rows], pa.int32()),
            "nbytes": column_of(merged.nbytes[rows], pa.int64()),
        }
    )
