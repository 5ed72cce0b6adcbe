"""Sharing work out between ranks so that all of them finish at about the same time."""

from __future__ import annotations

import heapq

import numpy as np

from distckpt.format.arrays import Ints

_LARGE = 4


def spread(sizes: Ints, load: Ints) -> Ints:
    """Which worker takes each item; ``load`` is what each worker has already. No random choice.

    The largest items, four a worker, go one by one to whoever has least; the many that are left fill all workers up to
    one level, like water, in one pass. The fullest worker is over that level by about one of the largest items at most.
    """
    order = np.argsort(-sizes, kind="stable")
    large, small = order[: _LARGE * len(load)], order[_LARGE * len(load) :]
    taken = np.empty(len(sizes), np.int64)
    taken[large], load = _one_by_one(sizes[large], load)
    taken[small] = _fill(sizes[small], load)
    return taken


def _one_by_one(sizes: Ints, load: Ints) -> tuple[Ints, Ints]:
    heap = [(have, worker) for worker, have in enumerate(load.tolist())]
    heapq.heapify(heap)
    taken = []
    for size in sizes.tolist():
        have, worker = heap[0]
        heapq.heapreplace(heap, (have + size, worker))
        taken.append(worker)
    after = np.empty(len(load), np.int64)
    for have, worker in heap:
        after[worker] = have
    return np.array(taken, np.int64), after


def _fill(sizes: Ints, load: Ints) -> Ints:
    """Lay the items end to end and cut them where the room that each worker has below the water level ends."""
    room = np.maximum(_level(load, int(sizes.sum())) - load, 0.0)
    middles = np.cumsum(sizes) - sizes / 2
    taken = np.searchsorted(np.cumsum(room), middles, side="right")
    return np.minimum(taken, len(load) - 1)


def _level(load: Ints, amount: int) -> float:
    """How high ``amount`` of water stands over a floor with these heights."""
    floor = np.sort(load)
    levels = (np.cumsum(floor) + amount) / np.arange(1, len(floor) + 1)
    dry = np.flatnonzero(levels[:-1] <= floor[1:])
    return float(levels[dry[0]] if len(dry) else levels[-1])
