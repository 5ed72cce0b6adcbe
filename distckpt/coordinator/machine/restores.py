"""Collective restores: all ranks restore the same checkpoint, and fall back together when one of them cannot.

What follows from the log, be it that there is nothing to restore, is told once it is sure that the log has nothing newer:
a job that another has followed would otherwise go on with an older checkpoint, because the newer ones are the other's and
the old ones deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.intentions import Confirm
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.restore_round import RestoreRound
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import Refused, Reply, Restore
from distckpt.errors import DistckptError, MissingRanksError, RestoreError

REMEMBERED_ROUNDS = 16


@dataclass(slots=True, eq=False)
class _Round(RestoreRound):
    """``heard`` is when each rank spoke last, and ``deadline`` when to look who has not, in monotonic seconds.

    ``verdict`` is the outcome as soon as it is sure, for which ``asked`` stands.
    """

    deadline: float = 0.0
    heard: dict[int, float] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    verdict: Reply | None = None
    asked: int = 0


class Restores:
    """All restore rounds of the current run, and the outcomes of the latest ones."""

    def __init__(self, desk: Desk, ledger: Ledger, runs: Runs) -> None:
        self._desk = desk
        self._ledger = ledger
        self._runs = runs
        self._rounds: dict[int, _Round] = {}
        self._open: dict[int, _Round] = {}
        self._asked = 0

    @property
    def busy(self) -> bool:
        """Whether a restore is unfinished."""
        return bool(self._open)

    @property
    def protected(self) -> frozenset[str]:
        """Attempts that are being restored."""
        return frozenset(round.current.attempt for round in self._open.values() if round.candidates)

    def waiting(self) -> dict[str, tuple[int, ...]]:
        """For each attempt that is being restored the ranks that are still awaited."""
        rounds = (round for round in self._open.values() if round.candidates)
        return {round.current.attempt: tuple(self._missing(round)) for round in rounds}

    def deadlines(self) -> Iterator[float]:
        """When restores will be given up, in monotonic seconds."""
        return (round.deadline for round in self._open.values())

    def abandon(self, error: DistckptError) -> None:
        """End every round with ``error``."""
        for order in list(self._open):
            self._end(order, Refused(error))
        self._rounds.clear()

    def restore(self, ticket: int, rank: int, message: Restore) -> None:
        """A rank wants to restore, or says what came of the last candidate."""
        round = self._rounds.get(message.order) or self._new_round(message)
        if round.outcome is None and round.verdict is None:
            self._hear(round, rank, message)
        if round.outcome is not None:
            self._desk.answer(ticket, round.outcome)
        elif round.verdict is not None or rank in round.reported:
            self._desk.hold(ticket, round.waiting, rank)
        else:
            self._desk.answer(ticket, round.question)

    def alive(self, rank: int) -> None:
        """A rank gave a sign of life; restoring may take it longer than the timeout once it has begun."""
        for round in self._open.values():
            if rank in round.heard:
                round.heard[rank] = self._desk.mono

    def confirmed(self, asked: int) -> None:
        """The log has nothing newer: what a round has come to holds."""
        for order, round in list(self._open.items()):
            if round.asked == asked and round.verdict is not None:
                self._end(order, round.verdict)

    def tick(self) -> None:
        """Give up rounds whose missing ranks have been silent for too long."""
        for order, round in list(self._open.items()):
            if round.deadline <= self._desk.mono:
                self._expire(order, round)

    @property
    def _current(self) -> Run:
        assert self._runs.current is not None
        return self._runs.current

    def _new_round(self, first: Restore) -> _Round:
        run, state = self._current, self._ledger.state
        round = _Round(self._desk.directory, run.world_size, first.which, first.partial, run.name, state)
        round.deadline = self._desk.mono + run.save_timeout
        self._rounds[first.order] = self._open[first.order] = round
        self._settle(first.order, round)
        return round

    def _hear(self, round: _Round, rank: int, message: Restore) -> None:
        round.heard[rank] = self._desk.mono
        if round.hear(rank, self._current.hosts.get(rank, ""), message):
            round.deadline = self._desk.mono + self._current.save_timeout
        if round.is_complete:
            round.advance(self._ledger.state)
            if round.outcome is None:
                self._desk.answer_shelf(round.waiting, round.question)
        self._settle(message.order, round)

    def _settle(self, order: int, round: _Round) -> None:
        """Take note if the round is over."""
        if round.outcome is None:
            return
        if round.rests_on_log:
            self._conclude(round)
        else:
            self._end(order, round.outcome)

    def _conclude(self, round: _Round) -> None:
        """This is what becomes of it, if the log has nothing newer."""
        self._asked += 1
        round.verdict, round.outcome, round.asked = round.outcome, None, self._asked
        round.deadline = self._desk.mono + self._current.save_timeout
        self._ledger.confirm(Confirm(self._asked))

    def _missing(self, round: _Round) -> list[int]:
        return [rank for rank in range(self._current.world_size) if rank not in round.reported]

    def _expire(self, order: int, round: _Round) -> None:
        timeout = self._current.save_timeout
        if round.verdict is not None:
            reason = f"it cannot be made sure that no newer run owns the directory: {self._ledger.doubt or 'no answer'}"
            self._end(order, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
            return
        silent = [
            rank
            for rank in self._missing(round)
            if rank not in round.heard or round.heard[rank] + timeout <= self._desk.mono
        ]
        if not silent:
            round.deadline = min(round.heard[rank] for rank in self._missing(round)) + timeout
            return
        hosts = self._current.hosts_of(silent)
        self._end(order, Refused(MissingRanksError(None, silent, hosts, timeout, "to restore")))

    def _end(self, order: int, outcome: Reply) -> None:
        round = self._open.pop(order)
        round.outcome = outcome
        self._desk.answer_shelf(round.waiting, outcome)
        if len(self._rounds) - len(self._open) > REMEMBERED_ROUNDS:
            del self._rounds[next(old for old in self._rounds if old not in self._open)]
