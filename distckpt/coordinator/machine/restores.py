"""Collective restores: all ranks restore the same checkpoint, and fall back together when one of them cannot.

Ranks wait for each other in every stage, so there is one round at a time, and a rank that begins takes part in it,
however many restores it has called before.

What follows from the log, be it that there is nothing to restore, is told once it is sure that the log has nothing newer:
a job that another has followed would otherwise go on with an older checkpoint, because the newer ones are the other's and
the old ones deleted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.intentions import Confirm
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.library import Found, Library
from distckpt.coordinator.machine.restore_round import RestoreRound, pages_for
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import Refused, Reply, Restore
from distckpt.errors import DistckptError, MissingRanksError, RestoreError
from distckpt.format.json.log import State
from distckpt.format.json.paging import opened

REMEMBERED_ROUNDS = 16


@dataclass(slots=True, eq=False)
class _Round(RestoreRound):
    """``heard`` is when each rank spoke last, and ``deadline`` when to look who has not, in monotonic seconds.

    ``orders`` has the counter of each rank that takes part. ``verdict`` is the outcome as soon as it is sure, for which
    ``asked`` stands.
    """

    orders: dict[int, int] = field(default_factory=dict)
    deadline: float = 0.0
    heard: dict[int, float] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    verdict: Reply | None = None
    asked: int = 0


class Restores:
    """The restore rounds of the current run, of which one is open at most, and the outcomes of the latest ones."""

    def __init__(self, desk: Desk, ledger: Ledger, runs: Runs, library: Library) -> None:
        self._desk = desk
        self._ledger = ledger
        self._runs = runs
        self._library = library
        self._looking: dict[int, None] = {}
        self._rounds: deque[_Round] = deque(maxlen=REMEMBERED_ROUNDS)
        self._begun = 0
        self._asked = 0

    @property
    def busy(self) -> bool:
        """Whether a restore is unfinished."""
        return self._open is not None

    @property
    def protected(self) -> frozenset[str]:
        """Attempts that are being restored."""
        return frozenset(self.waiting())

    def waiting(self) -> dict[str, tuple[int, ...]]:
        """For an attempt that is being restored the ranks that are still awaited."""
        round = self._open
        return {round.current.attempt: tuple(self._missing(round))} if round is not None and round.candidates else {}

    def deadlines(self) -> Iterator[float]:
        """When a restore will be given up, in monotonic seconds."""
        return iter([self._open.deadline] if self._open is not None else [])

    def abandon(self, error: DistckptError) -> None:
        """End every round with ``error``."""
        if self._open is not None:
            self._end(self._open, Refused(error))
        self._rounds.clear()

    def restore(self, ticket: int, rank: int, message: Restore, found: Found | None = None) -> None:
        """A rank wants to restore, or says what came of the last candidate.

        ``found`` are the pages that may have the checkpoint, if they had to be read.
        """
        if message.order < max((round.orders.get(rank, 0) for round in self._rounds), default=0):
            reason = f"rank {rank} has begun a later restore already: if as another process, give a new run_id"
            self._desk.answer(ticket, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
            return
        round = next((round for round in self._rounds if round.orders.get(rank) == message.order), None)
        if round is None and found is None and (pages := tuple(pages_for(message.which, self._ledger.sound))):
            self._desk.hold(ticket, self._looking, None)
            self._library.read(pages, lambda found: self._looked(ticket, rank, message, found))
            return
        round = round or self._joined(rank, message, opened(self._ledger.sound, found or {}))
        if round.outcome is None and round.verdict is None and not round.wants_pages:
            self._hear(round, rank, message)
        if round.outcome is not None:
            self._desk.answer(ticket, round.outcome)
        elif round.verdict is not None or round.wants_pages or rank in round.reported:
            self._desk.hold(ticket, round.waiting, rank)
        else:
            self._desk.answer(ticket, round.question)

    def _looked(self, ticket: int, rank: int, message: Restore, found: Found) -> None:
        if ticket in self._looking:  # else nobody waits any more
            self._desk.forget(ticket)
            self.restore(ticket, rank, message, found)

    def alive(self, rank: int) -> None:
        """A rank gave a sign of life; restoring may take it longer than the timeout once it has begun."""
        if self._open is not None and rank in self._open.heard:
            self._open.heard[rank] = self._desk.mono

    def confirmed(self, asked: int) -> None:
        """The log has nothing newer: what a round has come to holds."""
        round = self._open
        if round is not None and round.asked == asked and round.verdict is not None:
            self._end(round, round.verdict)

    def tick(self) -> None:
        """Give up a round whose missing ranks have been silent for too long, or which rests on a log that is lost."""
        round = self._open
        if round is not None and round.verdict is not None and self._ledger.is_lost:
            reason = (
                "the log has no entry any more. The directory was deleted, unmounted or moved, or another is in its place. "
                "Nothing was written there. The objects may hold part of a checkpoint: restore again once it is back"
            )
            self._end(round, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
        elif round is not None and round.deadline <= self._desk.mono:
            self._expire(round)

    @property
    def _current(self) -> Run:
        assert self._runs.current is not None
        return self._runs.current

    @property
    def _open(self) -> _Round | None:
        return self._rounds[-1] if self._rounds and self._rounds[-1].outcome is None else None

    def _joined(self, rank: int, message: Restore, state: State) -> _Round:
        """The round that a restore which the rank begins belongs to.

        It is the one that waits for the rank, or would if another rank had not failed it: until its deadline the rank is
        told so. A round that has given the rank up is over, and so is one that the rank has given up.
        """
        round = self._rounds[-1] if self._rounds else None
        if round is not None and round is self._open and rank in round.orders:
            reason = f"rank {rank} ({self._current.hosts.get(rank, '')}) has begun another restore"
            self._end(round, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
        if round is None or rank in round.orders or (round.outcome is not None and round.deadline <= self._desk.mono):
            round = self._new_round(message, state)
        round.orders[rank] = message.order
        return round

    def _new_round(self, first: Restore, state: State) -> _Round:
        run = self._current
        lost = self._library.errors(pages_for(first.which, self._ledger.state))
        round = _Round(self._desk.directory, run.world_size, first.which, first.partial, run.name, state, lost)
        self._begun += 1
        round.label = f"{self._ledger.epoch}-{self._begun}"
        round.deadline = self._desk.mono + run.save_timeout
        self._rounds.append(round)
        return round

    def _hear(self, round: _Round, rank: int, message: Restore) -> None:
        round.heard[rank] = self._desk.mono
        if round.hear(rank, self._current.hosts.get(rank, ""), message):
            round.deadline = self._desk.mono + self._current.save_timeout
        if round.is_complete:
            round.advance(self._ledger.state)
            if round.wants_pages:
                pages = self._library.sound(round.state).pages
                self._library.read(pages, lambda found: self._extend(round, found))
            elif round.outcome is None:
                self._desk.answer_shelf(round.waiting, round.question)
        self._come_to_its_end(round)

    def _extend(self, round: _Round, found: Found) -> None:
        """There are older candidates, or none."""
        if round.outcome is not None:
            return
        lost = self._library.errors(dict.fromkeys((*round.state.pages, *self._ledger.state.pages)))
        round.extend(opened(round.state, found), list(map(str, lost)))
        if round.outcome is None:
            self._desk.answer_shelf(round.waiting, round.question)
        self._come_to_its_end(round)

    def _come_to_its_end(self, round: _Round) -> None:
        if round.outcome is None:
            return
        if round.rests_on_log:
            self._conclude(round)
        else:
            self._end(round, round.outcome)

    def _conclude(self, round: _Round) -> None:
        """This is what becomes of it, if the log has nothing newer."""
        self._asked += 1
        round.verdict, round.outcome, round.asked = round.outcome, None, self._asked
        round.deadline = self._desk.mono + self._current.save_timeout
        self._ledger.confirm(Confirm(self._asked))

    def _missing(self, round: _Round) -> list[int]:
        return [rank for rank in range(self._current.world_size) if rank not in round.reported]

    def _expire(self, round: _Round) -> None:
        timeout = self._current.save_timeout
        if round.verdict is not None:
            reason = f"it cannot be made sure that no newer run owns the directory: {self._ledger.doubt or 'no answer'}"
            self._end(round, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
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
        self._end(round, Refused(MissingRanksError(None, silent, hosts, timeout, "to restore")))

    def _end(self, round: _Round, outcome: Reply) -> None:
        round.outcome = outcome
        self._desk.answer_shelf(round.waiting, outcome)
