"""Which training step was saved last."""

from __future__ import annotations

from distckpt.rank.pending import PendingSave, progress_of


class SavedSteps:
    """Remembers the last step whose save counts. A failed save does not, so its step may be tried again."""

    def __init__(self, last: int | None) -> None:
        self._steps: list[tuple[int | None, PendingSave | None]] = [(last, None)]

    def add(self, step: int, pending: PendingSave | None) -> None:
        """``step`` counts unless ``pending`` fails; without ``pending``, whatever becomes of its save."""
        self._steps.append((step, pending))

    def restart(self, last: int | None) -> None:
        """Forget all others: training goes on from the step ``last``, which is saved."""
        self._steps = [(last, None)]

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
