"""Stops of the whole cluster: the first request or error of any rank is everyone's, and a silent rank is an error.

All of it is in memory only. After a restart ranks tell again what they know: the stop, and who takes part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.runs import Runs
from distckpt.coordinator.messages import AwaitStop, Members, Refused, StopState, merged_members
from distckpt.errors import DistckptError, RankSilentError
from distckpt.threads.report import StopReport

REMEMBERED_GENERATIONS = 16
TOLD_OF_LEAVING = 8
"""So many ranks learn at once that one has left; it takes all of them dying with the coordinator to forget it."""

MANAGER_SILENCE = 60.0
"""A rank that has not joined is known to live by its manager's heartbeats, every 20 seconds. It may miss two."""


def _silence(rank: int, host: str, seconds: float) -> StopReport:
    reason = f"no sign of life for {seconds:.3g} s"
    return StopReport(rank, host, RankSilentError.__name__, reason=reason, silent=seconds)


@dataclass(slots=True, eq=False)
class _Generation:
    """``timeouts`` are seconds of silence by rank; ``waiting`` has the rank by ticket.

    ``expected`` are ranks of the run that have not joined, with the monotonic time since when they are watched.
    Those who wait are answered together, ``answer_by`` (monotonic) the first of them would lose patience.
    """

    members: Members = field(default_factory=dict)
    timeouts: dict[int, float] = field(default_factory=dict)
    expected: dict[int, float] = field(default_factory=dict)
    stop: StopReport | None = None
    waiting: dict[int, int] = field(default_factory=dict)
    answer_by: float = math.inf

    @property
    def deserted(self) -> bool:
        return all(host is None for host in self.members.values())


class Stops:
    """The generations of the current run. ``deadline`` is the monotonic time by which a tick is wanted, or None."""

    def __init__(self, desk: Desk, runs: Runs) -> None:
        self.deadline: float | None = None
        self._desk = desk
        self._runs = runs
        self._generations: dict[int, _Generation] = {}
        self._heard: dict[int, float] = {}

    def abandon(self, error: DistckptError) -> None:
        """Answer everyone with ``error`` and forget everything."""
        for generation in self._generations.values():
            self._desk.answer_shelf(generation.waiting, Refused(error))
        self._generations.clear()
        self._heard.clear()
        self.deadline = None

    def alive(self, rank: int) -> None:
        """The rank gave a sign of life."""
        self._heard[rank] = self._desk.mono

    def leave(self, rank: int) -> None:
        """The rank takes part in nothing any more. What it waits for is answered."""
        for generation in self._generations.values():
            for ticket in [ticket for ticket, whose in generation.waiting.items() if whose == rank]:
                self._answer(ticket, generation)
            if rank in generation.members:
                self._left(generation, rank)
        self._forget()

    def await_stop(self, ticket: int, rank: int, message: AwaitStop) -> None:
        """A rank takes part, tells what it knows, and waits for news."""
        generation = self._generations.setdefault(message.generation, _Generation())
        generation.members = merged_members(generation.members, message.members)
        if message.silence_timeout is None:
            self._left(generation, rank)
        else:
            self._watch(generation, rank, message.silence_timeout)
        if message.known is not None and generation.stop is None:
            self._stop(generation, message.known)
        if message.silence_timeout is None:
            self._answer(ticket, generation)
            self._forget()
        elif message.patience <= 0 or generation.stop != message.known:
            self._answer(ticket, generation)
        else:
            self._desk.hold(ticket, generation.waiting, rank)
            generation.answer_by = min(generation.answer_by, self._desk.mono + message.patience)
            self._wake_by(generation.answer_by)

    def tick(self) -> None:
        """Answer those whose patience ends, and stop generations in which a rank has been silent for too long."""
        if self.deadline is None or self.deadline > self._desk.mono:
            return
        late, self.deadline = self._desk.mono - self.deadline, None
        for generation in self._generations.values():
            if generation.stop is None:
                self._look_for_silence(generation, late)
            if generation.answer_by <= self._desk.mono:
                self._answer_all(generation)
            self._wake_by(generation.answer_by)

    @property
    def _hosts(self) -> Mapping[int, str]:
        return self._runs.current.hosts if self._runs.current is not None else {}

    def _look_for_silence(self, generation: _Generation, late: float) -> None:
        self._expect(generation)
        for rank, host, timeout, heard in self._watched(generation):
            silent = self._desk.mono - heard
            if silent >= timeout and late > timeout / 4:
                # This look comes late, so it was the coordinator that stood still; what ranks say is still to be heard.
                self._heard[rank], silent = self._desk.mono, 0.0
            if silent >= timeout:
                self._stop(generation, _silence(rank, host, silent))
                return
            self._wake_by(self._desk.mono - silent + timeout)

    def _watched(self, generation: _Generation) -> Iterator[tuple[int, str, float, float]]:
        """Rank, host, longest silence and when it was heard last: of who takes part, then of who has yet to join."""
        for rank, timeout in generation.timeouts.items():
            host = generation.members.get(rank)
            if host is not None:
                yield rank, host, timeout, self._heard[rank]
        hosts = self._hosts
        timeout = max(MANAGER_SILENCE, *generation.timeouts.values(), 0.0)
        for rank, since in generation.expected.items():
            yield rank, hosts.get(rank, ""), timeout, max(since, self._heard.get(rank, since))

    def _expect(self, generation: _Generation) -> None:
        """Watch those who belong to the run, have not left it and have not joined, while others take part."""
        run = self._runs.current
        if run is None or generation.deserted:
            generation.expected = {}
            return
        missing = [rank for rank in run.hosts if rank not in run.left and rank not in generation.members]
        generation.expected = {rank: generation.expected.get(rank, self._desk.mono) for rank in missing}

    def _watch(self, generation: _Generation, rank: int, timeout: float) -> None:
        """Watch this rank, and those that were watched before the coordinator was replaced."""
        if rank not in generation.members:
            hosts = self._hosts
            generation.members = {**generation.members, rank: hosts.get(rank, "")}
        generation.timeouts[rank] = timeout
        if len(generation.timeouts) < len(generation.members):
            for other in generation.members:
                generation.timeouts.setdefault(other, timeout)
                self._heard.setdefault(other, self._desk.mono)
        generation.expected.pop(rank, None)
        if len(generation.members) + len(generation.expected) < len(self._hosts):
            self._expect(generation)
        self._wake_by(self._desk.mono + timeout)

    def _left(self, generation: _Generation, rank: int) -> None:
        generation.members = {**generation.members, rank: None}
        for ticket in list(generation.waiting)[:TOLD_OF_LEAVING]:
            self._answer(ticket, generation)

    def _stop(self, generation: _Generation, report: StopReport) -> None:
        generation.stop = report
        self._answer_all(generation)

    def _answer_all(self, generation: _Generation) -> None:
        generation.answer_by = math.inf
        self._desk.answer_shelf(generation.waiting, StopState(generation.stop, generation.members))

    def _answer(self, ticket: int, generation: _Generation) -> None:
        self._desk.answer(ticket, StopState(generation.stop, generation.members))

    def _wake_by(self, moment: float) -> None:
        if moment < math.inf:
            self.deadline = moment if self.deadline is None else min(self.deadline, moment)

    def _forget(self) -> None:
        """Of generations that everyone has left only the latest few may still matter to a rank that comes late."""
        deserted = [number for number, generation in self._generations.items() if generation.deserted]
        for number in sorted(deserted)[:-REMEMBERED_GENERATIONS]:
            del self._generations[number]
