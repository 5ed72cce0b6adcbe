"""Whether what the ranks hold adds up to whole tensors. Every refusal names the key and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.errors import PlanError
from distckpt.format.arrays import Ints
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE
from distckpt.format.tree.path import RankStep, decode_path
from distckpt.sharding.coverage import Boxes, find_hole, find_overlap
from distckpt.sharding.merged import Codes, Merged, Tuples

_MOST_ELEMENTS = 1 << 58


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The distinct chunks of all ranks.

    ``of_row`` numbers the chunk of every row. ``rows`` lists all rows by chunk and, inside a chunk, by rank: those of
    chunk c are ``rows[starts[c] : starts[c + 1]]``, and ``first[c]`` is the first of them.
    """

    of_row: Ints
    rows: Ints
    starts: Ints

    @property
    def first(self) -> Ints:
        """One row of each chunk: that of the lowest rank that holds it."""
        return self.rows[self.starts[:-1]]

    def rows_of(self, chunk: int) -> Ints:
        """All rows of a chunk, by rank."""
        return self.rows[self.starts[chunk] : self.starts[chunk + 1]]


def checked_chunks(number: int | None, merged: Merged, fresh: Collection[int] | None = None) -> Chunks:
    """The distinct chunks, once it is sure that they tile every tensor and that all ranks agree on them.

    Values are compared between the ``fresh`` ranks, None meaning all. PlanError, about checkpoint ``number``, otherwise.
    """
    _check_agreement(number, merged, merged.path, "path", lambda code: str(merged.paths[code].as_py()))
    _check_agreement(number, merged, merged.dtype, "dtype", lambda code: str(merged.dtypes[code].as_py()))
    _check_agreement(number, merged, merged.shape, "shape", lambda code: str(list(merged.shapes[code])))
    _check_bounds(number, merged)
    _check_sizes(number, merged)
    chunks = _distinct(merged)
    _check_once_a_rank(number, merged, chunks)
    _check_same_values(number, merged, chunks, fresh)
    _check_tiling(number, merged, chunks)
    return chunks


def told(ranks: list[int], most: int = 8) -> str:
    """Ranks for a message, runs shortened: ``rank 3``, ``ranks 0-7, 12``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs[:most])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{' and more' if len(runs) > most else ''}"


def _check_agreement(number: int | None, merged: Merged, codes: Codes, what: str, text: Callable[[int], str]) -> None:
    """Every key has one path, one dtype and one shape."""
    expected = np.empty(len(merged.keys), np.int32)
    expected[merged.key[::-1]] = codes[::-1]
    wrong = np.flatnonzero(codes != expected[merged.key])
    if len(wrong) == 0:
        return
    rows = np.flatnonzero(merged.key == merged.key[wrong[0]])
    said = [(code, merged.ranks_of(rows[codes[rows] == code])) for code in dict.fromkeys(codes[rows].tolist())]
    shown = "; ".join(f"{told(ranks)} {'say' if len(ranks) > 1 else 'says'} {text(code)}" for code, ranks in said[:4])
    message = f"the ranks do not agree on its {what}: {shown}{' and others' if len(said) > 4 else ''}"
    raise PlanError(number, merged.key_text(rows[0]), _once(said), message)


def _once(said: list[tuple[int, list[int]]]) -> list[int]:
    return sorted({rank for _, ranks in said for rank in ranks})


def _check_bounds(number: int | None, merged: Merged) -> None:
    """Every rectangle has the dimensions of its tensor, lies inside it and, unless the tensor is empty, is not empty."""
    ndim = merged.shapes.sizes[merged.shape]
    wrong = (merged.offsets.sizes[merged.offset] != ndim) | (merged.lengths.sizes[merged.length] != ndim)
    empty = (_elements(merged.shapes) == 0)[merged.shape]
    for dim in range(_most_dims(merged.shapes)):
        size = merged.shapes.column(dim, 1)[merged.shape]
        offset, length = merged.offsets.column(dim, 0)[merged.offset], merged.lengths.column(dim, 1)[merged.length]
        wrong |= (size < 0) | (offset < 0) | (length > size) | (offset > size - length)
        wrong |= (length < 1) & ~empty | (length != size) & empty
    wrong |= (_elements(merged.shapes) > _MOST_ELEMENTS)[merged.shape]
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        shape = list(merged.shapes[int(merged.shape[row])])
        message = f"{merged.rectangle_text(row)} is no part of a tensor of shape {shape}"
        raise PlanError(number, merged.key_text(row), merged.ranks_of(np.array([row])), message)


def _check_sizes(number: int | None, merged: Merged) -> None:
    """Every chunk has the bytes that its elements take; plain values have none of their own."""
    item = np.array([_item_size(str(name)) for name in merged.dtypes.to_pylist()], np.int64)[merged.dtype]
    wrong = np.flatnonzero((merged.nbytes != item * _volumes(merged.lengths)[merged.length]) | (item < 0))
    if len(wrong):
        row = int(wrong[0])
        dtype = merged.dtypes[int(merged.dtype[row])].as_py()
        message = f"{merged.nbytes[row]} bytes are not what {merged.rectangle_text(row)} of dtype {dtype!r} takes"
        raise PlanError(number, merged.key_text(row), merged.ranks_of(np.array([row])), message)


def _item_size(dtype: str) -> int:
    """Bytes of an element, -1 for a dtype that does not exist."""
    return 0 if dtype == VALUE else ITEM_SIZES.get(dtype, -1)


def _most_dims(tuples: Tuples) -> int:
    return int(tuples.sizes.max(initial=0))


def _elements(tuples: Tuples) -> npt.NDArray[np.float64]:
    """The product of each tuple, near enough to see what is too large."""
    product = np.ones(len(tuples))
    for dim in range(_most_dims(tuples)):
        product *= tuples.column(dim, 1)
    return product


def _distinct(merged: Merged) -> Chunks:
    """Number chunks by key and offset: of chunks that do not overlap, no two of a tensor begin at the same place."""
    marks = merged.key.astype(np.int64) * len(merged.offsets) + merged.offset
    rows = np.argsort(marks, kind="stable")
    new = np.flatnonzero(np.diff(marks[rows], prepend=-1))
    starts = np.append(new, len(rows))
    of_row = np.empty(len(rows), np.int64)
    of_row[rows] = np.repeat(np.arange(len(new)), np.diff(starts))
    return Chunks(of_row, rows, starts)


def _check_once_a_rank(number: int | None, merged: Merged, chunks: Chunks) -> None:
    same_chunk = np.diff(chunks.of_row[chunks.rows]) == 0
    twice = np.flatnonzero(same_chunk & (np.diff(merged.rank[chunks.rows]) == 0))
    if len(twice):
        row = int(chunks.rows[twice[0]])
        message = f"one rank describes the same chunk twice, {merged.rectangle_text(row)}"
        raise PlanError(number, merged.key_text(row), merged.ranks_of(np.array([row])), message)


def _check_same_values(number: int | None, merged: Merged, chunks: Chunks, fresh: Collection[int] | None) -> None:
    told_now = (
        np.ones(len(merged.rank), bool) if fresh is None else np.isin(merged.rank, np.array(sorted(fresh), np.int32))
    )
    low = np.full(len(chunks.first), np.iinfo(np.int64).max)
    high = np.full(len(chunks.first), np.iinfo(np.int64).min)
    np.minimum.at(low, chunks.of_row[told_now], merged.crc[told_now])
    np.maximum.at(high, chunks.of_row[told_now], merged.crc[told_now])
    differ = np.flatnonzero(low < high)
    if len(differ) == 0:
        return
    rows = chunks.rows_of(int(differ[0]))
    rows = rows[told_now[rows]]
    same = merged.crc[rows] == merged.crc[rows[0]]
    message = (
        f"{told(merged.ranks_of(rows[~same]))} holds another value than {told(merged.ranks_of(rows[same]))}. "
        "Make it the same on all ranks, give modules that differ from rank to rank (experts, say) names of their own on "
        "each, or wrap what it belongs to, a dict above all, in distckpt.PerRank"
    )
    raise PlanError(number, merged.key_text(rows[0]), merged.ranks_of(rows), message)


def _check_tiling(number: int | None, merged: Merged, chunks: Chunks) -> None:
    first = chunks.first
    uneven = np.flatnonzero(merged.length != merged.length[first][chunks.of_row])
    if len(uneven):
        row = int(uneven[0])
        raise _overlap(number, merged, int(first[chunks.of_row[row]]), row)
    solid = first[_elements(merged.shapes)[merged.shape[first]] > 0]
    boxes = _boxes(merged, solid)
    pair = find_overlap(boxes)
    if pair is not None:
        raise _overlap(number, merged, int(solid[pair[0]]), int(solid[pair[1]]))
    _check_full(number, merged, solid, boxes)


def _boxes(merged: Merged, rows: Ints) -> Boxes:
    low, high = [], []
    for dim in range(max(1, _most_dims(merged.shapes))):
        low.append(merged.offsets.column(dim, 0)[merged.offset[rows]])
        high.append(low[-1] + merged.lengths.column(dim, 1)[merged.length[rows]])
    return Boxes(merged.key[rows].astype(np.int64), low, high)


def _overlap(number: int | None, merged: Merged, one: int, other: int) -> PlanError:
    ranks = merged.ranks_of(np.array([one, other]))
    message = (
        f"two different parts overlap: {merged.rectangle_text(one)} on rank {merged.rank[one]} "
        f"and {merged.rectangle_text(other)} on rank {merged.rank[other]}"
    )
    return PlanError(number, merged.key_text(one), ranks, message)


def _check_full(number: int | None, merged: Merged, rows: Ints, boxes: Boxes) -> None:
    """Rectangles that lie inside their tensor and do not overlap tile it exactly if they have as many elements."""
    held = np.zeros(len(merged.keys), np.int64)
    np.add.at(held, boxes.group, _volumes(merged.lengths)[merged.length[rows]])
    lacking = np.flatnonzero(held[boxes.group] != _volumes(merged.shapes)[merged.shape[rows]])
    if len(lacking) == 0:
        return
    mine = np.flatnonzero(boxes.group == boxes.group[lacking[0]])
    shape = merged.shapes[int(merged.shape[rows[mine[0]]])]
    offset, length = find_hole(shape, boxes.take(mine))
    row = rows[mine[0]]
    holders = merged.ranks_of(np.flatnonzero(merged.key == merged.key[row]))
    message = (
        f"no rank holds the part at offset {list(offset)} of length {list(length)} of its shape {list(shape)}; "
        f"{told(holders)} together hold {held[boxes.group[mine[0]]]} elements"
    )
    path = decode_path(str(merged.paths[int(merged.path[row])].as_py()), merged.key_text(row))
    if any(isinstance(step, RankStep) for step in path):
        message += (
            ". It is in a PerRank, which each rank has by itself: give what is sharded over ranks without PerRank"
        )
    raise PlanError(number, merged.key_text(row), holders, message)


def _volumes(tuples: Tuples) -> Ints:
    product = np.ones(len(tuples), np.int64)
    for dim in range(_most_dims(tuples)):
        product *= tuples.column(dim, 1)
    return product
