"""The saves of a rank that are under way, and whose turn it is to join."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Turn:
    """One save, of this number (None: it only prepares). When it ``began`` is in monotonic seconds."""

    order: int
    number: int | None
    began: float
    joined: bool = False


class Turns:
    """Counts the rank's saves and prepares. They join in that order, however many threads bring them to their end.

    Safe to use from several threads; begun in one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._under_way: dict[int, _Turn] = {}

    def begin(self, number: int | None) -> int:
        """One more begins, of this number (None: it only prepares); its place among all of this rank."""
        self._begun += 1
        turn = _Turn(self._begun, number, time.monotonic())
        # Last of all and without a lock: whatever interrupts the caller, it knows of what is under way.
        return self._under_way.setdefault(turn.order, turn).order

    def wait(self, order: int, timeout: float) -> None:
        """Return once all that began before have joined, or are over; those that are neither in time count as over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._before(order), timeout)
            for other in self._before(order):
                logger.warning("a save that began before has not joined within %g s, and is not waited for", timeout)
                self.end(other)

    def joined(self, order: int) -> None:
        """The coordinator has answered its join."""
        with self._changed:
            if (turn := self._under_way.get(order)) is not None:
                turn.joined = True
            self._changed.notify_all()

    def end(self, order: int) -> None:
        """It is over for this rank, however it ended. Saying so twice does no harm."""
        with self._changed:
            self._under_way.pop(order, None)
            self._changed.notify_all()

    def earlier(self, order: int) -> tuple[tuple[int, int | None], ...]:
        """Those under way that began before, each with its number."""
        return tuple((turn.order, turn.number) for turn in self._all() if turn.order < order)

    def age(self, order: int) -> float:
        """How many seconds ago it began."""
        turn = self._under_way.get(order)
        return 0.0 if turn is None else time.monotonic() - turn.began

    def _before(self, order: int) -> list[int]:
        return [turn.order for turn in self._all() if turn.order < order and not turn.joined]

    def _all(self) -> list[_Turn]:
        return sorted(self._under_way.copy().values(), key=lambda turn: turn.order)
