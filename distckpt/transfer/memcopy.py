"""Copying between places in memory, with several threads that share the work as they get to run."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

PIECE_BYTES = 2 << 20

Move = tuple[int, int, int]
"""Address to copy to, address to copy from, number of bytes."""


class MemoryCopier:
    """Copies with up to ``threads`` threads, the caller's among them.

    PyTorch's own threads split every tensor evenly and meet after each one, which takes several times as long as soon
    as one of them has to wait for its core: another rank, a data loader or a write under way is enough.
    """

    def __init__(self, threads: int) -> None:
        self._helpers = max(0, threads - 1)
        self._pool = ThreadPoolExecutor(max(1, self._helpers), "distckpt-copy")

    def copy(self, moves: Iterable[Move]) -> None:
        """Perform every move. Both ends of each must be valid memory until this returns, and not overlap."""
        left = deque(_pieces(moves))
        helpers = [self._pool.submit(_drain, left) for _ in range(min(self._helpers, len(left) - 1))]
        try:
            _drain(left)
        finally:
            left.clear()
            wait(helpers)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _pieces(moves: Iterable[Move]) -> Iterator[Move]:
    for move in moves:
        target, source, nbytes = move
        if nbytes <= PIECE_BYTES:
            yield move
            continue
        for start in range(0, nbytes, PIECE_BYTES):
            yield target + start, source + start, min(PIECE_BYTES, nbytes - start)


def _drain(left: deque[Move]) -> None:
    while True:
        try:
            move = left.popleft()
        except IndexError:
            return
        ctypes.memmove(*move)
