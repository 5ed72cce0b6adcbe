"""When to look at a log again."""

from __future__ import annotations

import threading
from typing import Protocol

from distckpt.storage import Store

POLL_SECONDS = 1.0


class News(Protocol):
    """Says when the log of a directory may have grown. For one thread at a time, but for ``close``."""

    def wait(self, seconds: float) -> None:
        """Return when the log may have grown since the last call, at once if it has, or after ``seconds``."""

    def close(self) -> None:
        """End a ``wait`` in any thread; from now on each returns at once."""


def news_of(store: Store) -> News:
    """News of the directory of ``store``, from storage alone."""
    return _Clockwork(store)


class _Clockwork:
    """It may have grown every second."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._closed = threading.Event()

    def wait(self, seconds: float) -> None:
        """See News."""
        self._closed.wait(min(seconds, POLL_SECONDS))

    def close(self) -> None:
        """See News."""
        self._closed.set()
