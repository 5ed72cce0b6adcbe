"""What a thread does for a rank, it does to the end: a call from inside another one would wait for itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distckpt.errors import CoordinatorError


class Alone:
    """Refuses a call that a signal handler or a hook makes while the same thread is inside another one."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._inside: dict[int, str] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """For the time of one call. CoordinatorError, at once, if this thread is inside another call already."""
        thread = threading.get_ident()
        outer = self._inside.get(thread)
        if outer is not None:
            raise CoordinatorError(
                f"{self._directory}: {what} was called while {outer} was running in the same thread, from a signal "
                f"handler or a hook, say. Nothing was done, and {outer} goes on: call {what} after it has returned"
            )
        self._inside[thread] = what
        try:
            yield
        finally:
            self._inside.pop(thread, None)
