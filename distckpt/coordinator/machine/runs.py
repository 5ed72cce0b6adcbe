"""Incarnations of the job. The newest one owns the directory; processes of an older one are turned away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.messages import OpenRun, Refused, Reply, Retention, RunOpened, Unknown
from distckpt.errors import CoordinatorError, StaleRunError
from distckpt.format.json.log import Entry, State

REMEMBERED_TOKENS = 1024


@dataclass(slots=True)
class Run:
    """What the ranks of one incarnation agree on, where they are (``hosts``), and who has left."""

    number: int
    world_size: int
    name: str
    retention: Retention
    save_timeout: float
    hosts: dict[int, str] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)

    @property
    def deserted(self) -> bool:
        """Whether every rank has left."""
        return len(self.left) == self.world_size

    def hosts_of(self, ranks: list[int]) -> dict[int, str]:
        """Where these ranks are, as far as they have reported."""
        return {rank: self.hosts[rank] for rank in ranks if rank in self.hosts}


class Runs:
    """The current run. ``on_new`` is told the StaleRunError that everything of the old run ends with.

    ``on_known`` is called when the settings of the current run become known: it began, or its ranks reported again.
    """

    def __init__(
        self, desk: Desk, ledger: Ledger, on_new: Callable[[StaleRunError], None], on_known: Callable[[Run], None]
    ) -> None:
        self.current: Run | None = None
        self._desk = desk
        self._ledger = ledger
        self._on_new = on_new
        self._on_known = on_known
        self._superseded: dict[str, int] = {}
        self._opening: dict[str, dict[int, OpenRun]] = {}

    def refusal(self, run: int, rank: int) -> Reply | None:
        """What a process of ``run`` is told instead of being served; None if it belongs to the current run."""
        number = self._ledger.state.run
        if run < number:
            return Refused(StaleRunError(self._desk.directory, run, number))
        if run > number or self.current is None or rank not in self.current.hosts:
            return Unknown()
        return None

    def open(self, ticket: int, message: OpenRun) -> None:
        """A process reports: to the current run, to the one that is just beginning, or as the first of a new one."""
        state = self._ledger.state
        if message.token in self._opening:
            self._desk.hold(ticket, self._opening[message.token], message)
        elif state.run and message.token == state.run_token:
            self._register(ticket, message)
        elif message.token in self._superseded or is_superseded(message, state):
            known = self._superseded.get(message.token, message.run)
            self._desk.answer(ticket, Refused(StaleRunError(self._desk.directory, known, state.run)))
        else:
            self._begin(ticket, message)

    def _begin(self, ticket: int, message: OpenRun) -> None:
        wrong = _wrong_rank(message.rank, message.world_size)
        if wrong:
            self._desk.answer(ticket, Refused(CoordinatorError(f"{self._desk.directory}: {wrong}")))
            return
        self._opening[message.token] = {}
        self._desk.hold(ticket, self._opening[message.token], message)

        def change(state: State) -> State:
            number = max(state.run, message.run) + 1
            self._supersede(state.run_token, state.run)
            self._ledger.manager_made()
            return msgspec.structs.replace(state, run=number, run_token=message.token, saves=0)

        self._ledger.intend("run", change, lambda entry: self._begun(entry, message))

    def _begun(self, entry: Entry, first: OpenRun) -> None:
        old = self.current.number if self.current is not None else entry.state.run - 1
        self.current = None
        self._on_new(StaleRunError(self._desk.directory, old, entry.state.run))
        self._settle(first)
        for ticket, message in list(self._opening.pop(first.token).items()):
            self._register(ticket, message)

    def _supersede(self, token: str, number: int) -> None:
        if number:
            self._superseded[token] = number
        if len(self._superseded) > REMEMBERED_TOKENS:
            del self._superseded[next(iter(self._superseded))]

    def _settle(self, first: OpenRun) -> Run:
        number = self._ledger.state.run
        self.current = Run(number, first.world_size, first.name, first.retention, first.save_timeout)
        self._on_known(self.current)
        return self.current

    def _register(self, ticket: int, message: OpenRun) -> None:
        wrong = _wrong_rank(message.rank, message.world_size) or self._disagreement(message)
        if wrong:
            self._desk.answer(ticket, Refused(CoordinatorError(f"{self._desk.directory}: {wrong}")))
            return
        run = self.current or self._settle(message)
        run.hosts[message.rank] = message.host
        run.left.discard(message.rank)
        managed = self._ledger.recovered(self._ledger.state).active
        self._desk.answer(ticket, RunOpened(run.number, self._ledger.epoch, managed))

    def _disagreement(self, message: OpenRun) -> str:
        run = self.current
        if run is None:
            return ""
        if message.world_size != run.world_size:
            return f"rank {message.rank} counts {message.world_size} ranks, but others of its run {run.world_size}"
        if message.name != run.name:
            return f"rank {message.rank} saves as {message.name!r}, but others of its run as {run.name!r}"
        return ""


def is_superseded(opening: OpenRun, state: State) -> bool:
    """Whether a process that opens its run again belongs to one that another has followed."""
    return 0 < opening.run <= state.run and opening.token != state.run_token


def _wrong_rank(rank: int, world_size: int) -> str:
    return "" if 0 <= rank < world_size else f"rank {rank} is not one of {world_size} ranks"
