"""What a process may have under way at once, and send and receive in a second: its share of what its node may."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distckpt.storage.node import ranks_here

CONNECTIONS = 32
"""Of a node, for all of its ranks together."""

_LEAST = 4
_AHEAD = 0.1


def share_of_node(connections: int = CONNECTIONS) -> int:
    """This process's part of ``connections``: those of the node, divided by the ranks on it."""
    return max(min(_LEAST, connections), connections // ranks_here())


class Budget:
    """This process's share of ``connections`` at once; who comes later waits. A forked child begins with all of it.

    The share is taken when the first one asks: by then ranks know how many of them there are on the node.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._free: threading.BoundedSemaphore | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Room for one request while the block runs."""
        free = self.take()
        try:
            yield
        finally:
            free.release()

    def take(self) -> threading.BoundedSemaphore:
        """Room for one request until what is returned is released, in whichever thread."""
        if self._pid != os.getpid():
            self._free, self._pid, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            if self._free is None:
                self._free = threading.BoundedSemaphore(share_of_node(self._connections))
            free = self._free
        free.acquire()
        return free


class Bandwidth:
    """This process's share of ``rate`` bytes a second of its node, in one direction."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def count(self, nbytes: int) -> float:
        """So many bytes go over the wire: how many seconds it takes until there is room for them.

        Whoever has no time to wait need not: the others wait for him.
        """
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
        now = time.monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now - _AHEAD) + nbytes * ranks_here() / self._rate
            return max(0.0, self._free_at - now)


_budgets: dict[tuple[str, int], Budget] = {}
_bandwidths: dict[float, tuple[Bandwidth, Bandwidth]] = {}


def budget_of(server: str, connections: int) -> Budget:
    """The budget for one server, the same for all stores of this process there."""
    return _budgets.setdefault((server, connections), Budget(connections))


def bandwidths_of(rate: Any) -> tuple[Bandwidth, Bandwidth] | None:
    """Up and down, the same for all stores of this process that were given this rate. None for no limit.

    ValueError if it is no number of bytes a second.
    """
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
        raise ValueError(f"storage_options: bandwidth is a number of bytes a second, above 0, not {rate!r}")
    return _bandwidths.setdefault(float(rate), (Bandwidth(rate), Bandwidth(rate)))
