"""Collective restores: all ranks restore the same checkpoint, and fall back together when one of them cannot.

Each candidate goes through three stages. First every rank says how its objects match it, which changes nothing; only if
that will do for all of them, they read it, which fills tensors where they are; and only once all have read all of it,
and every byte was good, they hand it to everything else. So what a refused candidate has touched, the next one fills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.records import find_folder, find_number, record_path
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import (
    FillFrom,
    FinishWith,
    KeyMatch,
    MatchWith,
    Mismatched,
    Refused,
    Reply,
    Restore,
    Restored,
    RestoreStage,
    merged_matches,
)
from distckpt.errors import (
    CheckpointNotFoundError,
    DistckptError,
    MissingRanksError,
    NoGoodCheckpointError,
    RestoreError,
)
from distckpt.format.json.log import CheckpointRecord

REMEMBERED_ROUNDS = 16


@dataclass(slots=True, eq=False)
class _Round:
    """``candidates`` are what is left to try, best first; its first element is being tried.

    ``keys`` is how those ranks match it that have said so. ``reported`` are ranks that are through with this ``stage``,
    ``refusal`` the first reason against the candidate; ``heard`` is when each rank spoke last, in monotonic seconds.
    ``spoiled`` says that a refused one has been read in part.
    """

    which: int | str | None
    partial: bool
    deadline: float
    candidates: list[CheckpointRecord]
    keys: KeyMatch | None = None
    stage: RestoreStage = "match"
    spoiled: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    reported: set[int] = field(default_factory=set)
    refusal: str = ""
    heard: dict[int, float] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    outcome: Reply | None = None

    @property
    def current(self) -> CheckpointRecord:
        return self.candidates[0]

    @property
    def question(self) -> Reply:
        """What is wanted of ranks that have not reported yet."""
        if self.stage == "finish" and self.keys is not None:
            return FinishWith(self.current, self.keys)
        if self.stage == "fill":
            return FillFrom(self.current)
        return MatchWith(self.current, self.refused)

    def is_answer(self, message: Restore) -> bool:
        """Whether a rank reports on what is wanted now, and not on an earlier candidate or stage."""
        if message.tried != self.current.attempt or message.stage != self.stage:
            return False
        return self.stage != "match" or bool(message.refused) or message.keys is not None

    def begin(self, stage: RestoreStage) -> None:
        """Nobody has reported on what is wanted from now on."""
        self.stage = stage
        self.reported = set()


class Restores:
    """All restore rounds of the current run, and the outcomes of the latest ones."""

    def __init__(self, desk: Desk, ledger: Ledger, runs: Runs) -> None:
        self._desk = desk
        self._ledger = ledger
        self._runs = runs
        self._rounds: dict[int, _Round] = {}
        self._open: dict[int, _Round] = {}

    @property
    def busy(self) -> bool:
        """Whether a restore is unfinished."""
        return bool(self._open)

    @property
    def protected(self) -> frozenset[str]:
        """Attempts that are being restored."""
        return frozenset(round.current.attempt for round in self._open.values())

    def waiting(self) -> dict[str, tuple[int, ...]]:
        """For each attempt that is being restored the ranks that are still awaited."""
        return {round.current.attempt: tuple(self._missing(round)) for round in self._open.values()}

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
        if round.outcome is None:
            self._hear(round, rank, message)
        if round.outcome is not None:
            self._desk.answer(ticket, round.outcome)
        elif rank in round.reported:
            self._desk.hold(ticket, round.waiting, rank)
        else:
            self._desk.answer(ticket, round.question)

    def alive(self, rank: int) -> None:
        """A rank gave a sign of life; restoring may take it longer than the timeout once it has begun."""
        for round in self._open.values():
            if rank in round.heard:
                round.heard[rank] = self._desk.mono

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
        deadline = self._desk.mono + self._current.save_timeout
        round = _Round(first.which, first.partial, deadline, self._candidates(first.which))
        self._rounds[first.order] = self._open[first.order] = round
        if not round.candidates:
            self._end(first.order, self._nothing(first.which))
        return round

    def _candidates(self, which: int | str | None) -> list[CheckpointRecord]:
        state = self._ledger.state
        if which is None:
            return list(state.newest_first())
        record = find_folder(state, which) if isinstance(which, str) else find_number(state, which, self._current.name)
        return [record] if record is not None else []

    def _nothing(self, which: int | str | None) -> Reply:
        if which is None:
            return Restored(None)
        path = f"{self._desk.directory}/{which if isinstance(which, str) else f'{self._current.name}-{which}'}"
        return Refused(CheckpointNotFoundError(path, "no such checkpoint is committed"))

    def _hear(self, round: _Round, rank: int, message: Restore) -> None:
        reason = _disagreement(round, rank, message)
        if message.failed:
            reason = f"rank {rank} ({self._current.hosts.get(rank, '')}) failed: {message.failed}"
        if reason:
            self._end(message.order, Refused(RestoreError(f"{self._desk.directory}: {reason}")))
            return
        round.heard[rank] = self._desk.mono
        if rank in round.reported or not round.is_answer(message):
            return
        round.deadline = self._desk.mono + self._current.save_timeout
        round.reported.add(rank)
        if message.refused and not round.refusal:
            host = self._current.hosts.get(rank, "")
            round.refusal = f"rank {rank} ({host}): {message.refused}"
        elif message.keys is not None and round.stage == "match":
            round.keys = message.keys if round.keys is None else merged_matches(round.keys, message.keys)
        if len(round.reported) == self._current.world_size:
            self._all_reported(message.order, round)

    def _all_reported(self, order: int, round: _Round) -> None:
        if round.refusal:
            self._fall_back(order, round)
        elif round.stage == "finish":
            self._end(order, Restored(round.current, round.refused))
        elif round.keys is not None and (round.keys.in_vain or not (round.partial or round.keys.fits)):
            self._end(order, Mismatched(round.current, round.keys))
        else:
            round.begin("fill" if round.stage == "match" else "finish")
            self._desk.answer_shelf(round.waiting, round.question)

    def _fall_back(self, order: int, round: _Round) -> None:
        refused = (record_path(self._desk.directory, round.current), round.refusal)
        round.refused = (*round.refused, refused)
        round.refusal = ""
        round.keys = None
        round.spoiled |= round.stage != "match"
        # What an older one lacks keeps what was there before: so it must not have been touched.
        is_last = round.stage == "finish" or (round.partial and round.spoiled)
        round.begin("match")
        # Retention may have taken older ones away meanwhile.
        alive = self._ledger.state.alive()
        left = [record for record in round.candidates[1:] if record.attempt in alive and not is_last]
        if not left:
            self._end(order, Refused(NoGoodCheckpointError(self._desk.directory, round.refused, round.spoiled)))
            return
        round.candidates = left
        self._desk.answer_shelf(round.waiting, round.question)

    def _missing(self, round: _Round) -> list[int]:
        return [rank for rank in range(self._current.world_size) if rank not in round.reported]

    def _expire(self, order: int, round: _Round) -> None:
        timeout = self._current.save_timeout
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


def _shown(which: int | str | None) -> str:
    return "the newest checkpoint" if which is None else f"checkpoint {which}"


def _disagreement(round: _Round, rank: int, message: Restore) -> str:
    if message.which != round.which:
        return f"rank {rank} restores {_shown(message.which)}, but others restore {_shown(round.which)}"
    if message.partial != round.partial:
        mine, others = ("partial", "strict") if message.partial else ("strict", "partial")
        return f"the restore of rank {rank} is {mine}, that of others {others}: all ranks must give the same partial"
    return ""
