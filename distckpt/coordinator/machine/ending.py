"""The end of training, which is known and not guessed: it is in the log once every rank of the run has said so."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.intentions import End
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.runs import Runs
from distckpt.coordinator.messages import Accepted, Refused
from distckpt.errors import CoordinatorError, DistckptError, ranks_at_hosts


class Ending:
    """Ranks that leave for good wait for each other: they are told when the log says that training is over, or why not."""

    def __init__(self, desk: Desk, ledger: Ledger, runs: Runs) -> None:
        self._desk = desk
        self._ledger = ledger
        self._runs = runs
        self._waiting: dict[int, int] = {}
        self._final: set[int] = set()
        self._deadline: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a rank waits."""
        return bool(self._waiting)

    def deadlines(self) -> Iterator[float]:
        """When those who wait are told for whom, in monotonic seconds."""
        return (at for at in (self._deadline,) if at is not None)

    def finish(self, ticket: int, rank: int) -> None:
        """A rank leaves and says that training is over. To say so twice does no harm."""
        run = self._runs.current
        assert run is not None
        if self._ledger.state.ended:
            self._desk.answer(ticket, Accepted())
            return
        self._desk.hold(ticket, self._waiting, rank)
        self._deadline = self._deadline or self._desk.mono + run.save_timeout
        is_last = rank not in self._final and len(self._final) == run.world_size - 1
        self._final.add(rank)
        if is_last:
            self._ledger.intend(End(run.number))
        self._look()

    def leave(self, rank: int) -> None:
        """A rank has left without saying so."""
        self._final.discard(rank)
        self._look()

    def over(self) -> None:
        """The log says it, or had nothing to change."""
        self._settle()
        self._desk.answer_shelf(self._waiting, Accepted())

    def abandon(self, error: DistckptError) -> None:
        """It does not come to that: ``error`` says why."""
        self._settle()
        self._desk.answer_shelf(self._waiting, Refused(error))

    def tick(self) -> None:
        """Give up on ranks that do not come."""
        run = self._runs.current
        if self._deadline is not None and self._deadline <= self._desk.mono and run is not None:
            missing = [rank for rank in range(run.world_size) if rank not in self._final]
            if missing:
                self._give_up(missing, f"have not said so within {run.save_timeout:g} s")

    def _look(self) -> None:
        run = self._runs.current
        if run is not None and run.deserted and self._waiting:
            missing = [rank for rank in range(run.world_size) if rank not in self._final]
            if missing:
                self._give_up(missing, "have left without saying so")

    def _give_up(self, missing: list[int], what: str) -> None:
        run = self._runs.current
        who = ranks_at_hosts(missing, run.hosts_of(missing) if run is not None else {})
        self.abandon(
            CoordinatorError(f"{self._desk.directory}: the log does not say that training is over: {who} {what}")
        )

    def _settle(self) -> None:
        self._final.clear()
        self._deadline = None
