"""Saves that wait until a group of readers has caught up, because it was promised that nothing is skipped or piled up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.keeping import Keeping
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.messages import Join, Lag, Reply

REMIND_SECONDS = 30.0
"""How often those who wait are told for whom. That is less than any rank waits for an answer."""


class Backpressure:
    """Joins of saves that are not to begin yet. No rank is missing, so no deadline runs while they wait."""

    def __init__(self, desk: Desk, book: RoundBook, keeping: Keeping) -> None:
        self._desk = desk
        self._book = book
        self._keeping = keeping
        self._waiting: dict[int, tuple[int, Join]] = {}
        self._since: float | None = None
        self._remind_at: float | None = None

    def deadlines(self) -> Iterator[float]:
        """When those who wait are told for whom, in monotonic seconds."""
        return (at for at in (self._remind_at,) if at is not None)

    def holds(self, ticket: int, rank: int, join: Join) -> bool:
        """Whether a save is not to begin yet, because a group of readers lags: then its join waits.

        Who skips saves rather than wait skips this one. What has begun goes on, on other ranks or with another coordinator.
        """
        if join.number is None or join.attempt or (join.skip_if_busy and not join.staged):
            return False
        if self._lag() is None or self._has_begun(rank, join):
            return False
        self._desk.hold(ticket, self._waiting, (rank, join))
        if self._since is None:
            self._since, self._remind_at = self._desk.mono, self._desk.mono + REMIND_SECONDS
        return True

    def let_go(self) -> Iterator[tuple[int, int, Join]]:
        """Ticket, rank and message of each that waits no longer; if it is time, the others are told for whom they wait."""
        lag = self._lag() if self._waiting else None
        for ticket, (rank, join) in list(self._waiting.items()):
            if lag is None or self._has_begun(rank, join):
                self._desk.forget(ticket)
                yield ticket, rank, join
        if lag is not None:
            self._remind(lag)
        elif not self._waiting:
            self._since = self._remind_at = None

    def end(self, outcome: Reply) -> None:
        """None of them is to begin any more."""
        self._desk.answer_shelf(self._waiting, outcome)

    def _lag(self) -> Lag | None:
        return self._keeping.lag(self._book.saving())

    def _has_begun(self, rank: int, join: Join) -> bool:
        return self._book.find(rank, join, self._desk.mono - join.age) is not None

    def _remind(self, lag: Lag) -> None:
        if self._since is not None and self._remind_at is not None and self._remind_at <= self._desk.mono:
            self._remind_at = self._desk.mono + REMIND_SECONDS
            self._desk.answer_shelf(self._waiting, replace(lag, seconds=self._desk.mono - self._since))
