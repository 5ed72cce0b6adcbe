"""A monotonic clock that a test moves on."""

from __future__ import annotations


class Clock:
    """Says what time it is by ``now``, which moves on by ``step`` with every look."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now
