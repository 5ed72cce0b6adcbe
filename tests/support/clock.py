"""A monotonic clock that a test moves on."""

from __future__ import annotations


class Clock:
    """Says what time it is by ``now``."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
