"""How far a transfer has come, told while it is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called now and then, from any thread but one at a time, with the bytes done and the bytes there are."""


class Meter:
    """Bytes done out of ``total``, as several threads do them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more."""
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self.total)
