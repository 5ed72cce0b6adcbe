"""Which training step was saved last, and whether that is too short ago to save again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distckpt.rank.arguments import whole
from distckpt.rank.pending import PendingSave, progress_of

StepCounter = int | Callable[[], int] | Any


class SavedSteps:
    """Remembers the last step whose save counts. A failed save does not, so its step may be tried again.

    Steps are those of ``counter``, and matter only if there is an ``interval``.
    """

    def __init__(self, last: int | None, counter: StepCounter | None, interval: int | None) -> None:
        self._steps: list[tuple[int | None, PendingSave | None]] = [(last, None)]
        self._counter = counter
        self.interval = interval

    def now(self) -> int | None:
        """The step that training is at; None if it does not matter."""
        if self.interval is None or self._counter is None:
            return None
        return whole(self._counter() if callable(self._counter) else self._counter, "step_counter")

    def too_early(self, step: int, check_interval: bool) -> bool:
        """Whether ``step`` is saved already or, with ``check_interval``, less than the interval behind one that is."""
        last = self.last()
        if self.interval is None or last is None:
            return False
        return step == last or (check_interval and step < last + self.interval)

    def add(self, step: int, pending: PendingSave | None) -> None:
        """``step`` counts unless ``pending`` fails; without ``pending``, whatever becomes of its save."""
        self._steps.append((step, pending))

    def restart(self) -> None:
        """Forget all others: training goes on from the step that it is at now, which is saved."""
        self._steps = [(self.now(), None)]

    def last(self) -> int | None:
        """The last of them; one whose save is under way counts. None if there is none."""
        kept: list[tuple[int | None, PendingSave | None]] = []
        for step, pending in self._steps:
            if pending is not None and not pending.done():
                kept.append((step, pending))
            elif pending is None or progress_of(pending).ended.exception() is None:
                kept = [(step, None)]
        self._steps = kept
        return kept[-1][0]
