"""Clocks: a monotonic one that a test moves on, and the wall clock of a host that is wrong."""

from __future__ import annotations

import time

from tests.support.warm import be_script


class Clock:
    """Says what time it is by ``now``, which moves on by ``step`` with every look."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def be_script_elsewhen(argv: list[str], seconds: float) -> None:
    """As ``be_script``, on a host whose clock is so many seconds ahead."""
    right = time.time
    time.time = lambda: right() + seconds
    be_script(argv)
