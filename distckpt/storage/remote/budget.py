"""How many requests that carry data a process has under way at once: its share of what the node may have."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CONNECTIONS = 32
"""Of a node, for all of its ranks together."""

_LEAST = 4


def share_of_node(connections: int = CONNECTIONS) -> int:
    """This process's part of ``connections``: those of the node, divided by the ranks that torchrun has started on it."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(min(_LEAST, connections), connections // max(1, int(ranks) if ranks.isdigit() else 1))


class Budget:
    """At most ``requests`` at once; who comes later waits. A forked child begins with all of it."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self._free = threading.BoundedSemaphore(requests)
        self._pid = os.getpid()

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
            self._free, self._pid = threading.BoundedSemaphore(self.requests), os.getpid()
        free = self._free
        free.acquire()
        return free
