"""Do rectangles tile their tensors? Exact for tilings of any form, for all tensors at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.format.arrays import Ints

_PAIRS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Rectangles of many tensors, none of them empty.

    ``group`` says which tensor each belongs to; ``low[d]`` and ``high[d]`` are where it begins and ends along dimension d
    (0 and 1 where its tensor has no such dimension).
    """

    group: Ints
    low: Sequence[Ints]
    high: Sequence[Ints]

    def take(self, which: npt.NDArray[np.integer]) -> Boxes:
        """Only those rectangles."""
        return Boxes(self.group[which], [low[which] for low in self.low], [high[which] for high in self.high])


def find_overlap(boxes: Boxes) -> tuple[int, int] | None:
    """Two rectangles of one tensor that share an element, or None.

    Splits the rectangles of each tensor wherever a plane parts them without cutting one. Rectangles that a plane parts
    are disjoint, so only those that no plane parts any more (a pinwheel, or a real overlap) are compared in pairs.
    """
    left = np.arange(len(boxes.group))
    group = boxes.group
    while True:
        before = len(left), len(np.unique(group))
        for low, high in zip(boxes.low, boxes.high, strict=True):
            left, group = _part(left, group, low[left], high[left])
        if len(left) == 0:
            return None
        if (len(left), len(np.unique(group))) == before:
            return _first_pair(boxes, left, group)


def _part(left: Ints, group: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Split groups along one dimension; those with one member are done with. Rectangles left, and their new groups."""
    if len(left) == 0:
        return left, group
    if int(high.max()) > (1 << 62) // (int(group.max()) + 1):
        low, high = _ranked(low, high)
    # Numbers that grow with the group and, inside it, with the position: one scan then serves all groups.
    base = group * int(high.max())
    order = np.argsort(base + low, kind="stable")
    begins, ends = (base + low)[order], np.maximum.accumulate((base + high)[order])
    parted = np.cumsum(np.concatenate([[False], begins[1:] >= ends[:-1]]))
    shared = np.bincount(parted)[parted] > 1
    return left[order[shared]], parted[shared]


def _ranked(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """The same order with small numbers."""
    _, codes = np.unique(np.concatenate([low, high]), return_inverse=True)
    return codes[: len(low)], codes[len(low) :]


def _first_pair(boxes: Boxes, left: Ints, group: Ints) -> tuple[int, int] | None:
    order = np.argsort(group, kind="stable")
    for members in np.split(left[order], np.flatnonzero(np.diff(group[order])) + 1):
        pair = _overlapping_pair(boxes.take(members))
        if pair is not None:
            return int(members[pair[0]]), int(members[pair[1]])
    return None


def _overlapping_pair(boxes: Boxes) -> tuple[int, int] | None:
    """Compare every rectangle with every other, in blocks that keep memory small."""
    total = len(boxes.group)
    step = max(1, _PAIRS // total)
    for start in range(0, total, step):
        here = slice(start, start + step)
        meet = np.arange(total)[None, :] > np.arange(total)[here, None]
        for low, high in zip(boxes.low, boxes.high, strict=True):
            meet &= (low[here, None] < high[None, :]) & (low[None, :] < high[here, None])
        if meet.any():
            one, other = np.argwhere(meet)[0]
            return start + int(one), int(other)
    return None


def find_hole(shape: Sequence[int], boxes: Boxes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and length of a rectangle of one tensor that none of its rectangles covers; they must not overlap.

    ValueError if there is no hole.
    """
    found = list(_hole(shape, boxes))
    return tuple(start for start, _ in found), tuple(length for _, length in found)


def _hole(shape: Sequence[int], boxes: Boxes) -> Iterator[tuple[int, int]]:
    """Walk down the dimensions: take the first slice that is not full, and look for the hole inside it."""
    for dim, size in enumerate(shape):
        low, high = boxes.low[dim], boxes.high[dim]
        cuts = np.unique(np.concatenate([[0, size], low, high]))
        start = _first_gap(cuts, low, high, _cross_sections(boxes, dim + 1, len(shape)), math.prod(shape[dim + 1 :]))
        yield int(cuts[start]), int(cuts[start + 1] - cuts[start])
        boxes = boxes.take(np.flatnonzero((low <= cuts[start]) & (cuts[start] < high)))


def _cross_sections(boxes: Boxes, dim: int, ndim: int) -> Ints:
    area = np.ones(len(boxes.group), np.int64)
    for low, high in zip(boxes.low[dim:ndim], boxes.high[dim:ndim], strict=True):
        area *= high - low
    return area


def _first_gap(cuts: Ints, low: Ints, high: Ints, areas: Ints, full: int) -> int:
    change = np.zeros(len(cuts), np.int64)
    np.add.at(change, np.searchsorted(cuts, low), areas)
    np.subtract.at(change, np.searchsorted(cuts, high), areas)
    gaps = np.flatnonzero(np.cumsum(change)[:-1] < full)
    if len(gaps) == 0:
        raise ValueError("the rectangles cover the whole tensor")
    return int(gaps[0])
