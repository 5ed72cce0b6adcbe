"""The saves of a rank that are under way, and whose turn it is to join."""

from __future__ import annotations

import threading
import time


class Turns:
    """Counts the rank's saves and prepares. They join in that order, however many threads bring them to their end.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._numbers: dict[int, int | None] = {}
        self._times: dict[int, float] = {}
        self._joined: set[int] = set()

    def begin(self, number: int | None) -> int:
        """One more begins, of this number (None: it only prepares); its place among all of this rank."""
        with self._changed:
            self._begun += 1
            self._numbers[self._begun] = number
            self._times[self._begun] = time.monotonic()
            return self._begun

    def wait(self, order: int) -> None:
        """Return once all that began before have joined, or are over."""
        with self._changed:
            self._changed.wait_for(lambda: all(other in self._joined for other in self._numbers if other < order))

    def joined(self, order: int) -> None:
        """The coordinator has answered its join."""
        with self._changed:
            self._joined.add(order)
            self._changed.notify_all()

    def end(self, order: int) -> None:
        """It is over for this rank, however it ended. Saying so twice does no harm."""
        with self._changed:
            self._numbers.pop(order, None)
            self._times.pop(order, None)
            self._joined.discard(order)
            self._changed.notify_all()

    def earlier(self, order: int) -> tuple[tuple[int, int | None], ...]:
        """Those under way that began before, each with its number."""
        with self._changed:
            return tuple(sorted((other, number) for other, number in self._numbers.items() if other < order))

    def age(self, order: int) -> float:
        """How many seconds ago it began."""
        with self._changed:
            began = self._times.get(order)
        return 0.0 if began is None else time.monotonic() - began
