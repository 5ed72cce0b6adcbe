"""Incarnations of the job. The newest one owns the directory; processes of an older one are turned away."""

from __future__ import annotations

from dataclasses import dataclass, field

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.intentions import BeginRun
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.messages import OpenRun, Refused, Reply, RunOpened, Unknown
from distckpt.errors import CoordinatorError, DirectoryLostError, DistckptError, StaleRunError
from distckpt.format.json.log import Entry, State
from distckpt.keep import Retention

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
    """The current run: ``current``, or None as long as nobody of it has reported to this coordinator."""

    def __init__(self, desk: Desk, ledger: Ledger) -> None:
        self.current: Run | None = None
        self._desk = desk
        self._ledger = ledger
        self._numbers: dict[str, int] = {}
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
        """A process reports: to the current run, to the one that is just beginning, or as the first of a new one.

        ``current`` is another one afterwards if the settings of the run that the log names became known by this.
        """
        state = self._ledger.state
        error = turned_away(message, state, self._desk.directory, whole=self._ledger.whole)
        if message.token in self._opening:
            self._desk.hold(ticket, self._opening[message.token], message)
        elif error is not None:
            self._desk.answer(ticket, Refused(error))
        elif state.run and message.token == state.run_token:
            self._register(ticket, message)
        elif message.token in self._numbers:
            known = self._numbers[message.token]
            self._desk.answer(ticket, Refused(StaleRunError(self._desk.directory, known, state.run)))
        else:
            self._begin(ticket, message)

    def _begin(self, ticket: int, message: OpenRun) -> None:
        wrong = _wrong_rank(message.rank, message.world_size)
        if wrong:
            self._desk.answer(ticket, Refused(CoordinatorError(f"{self._desk.directory}: {wrong}")))
            return
        self._remember(self._ledger.state)
        self._opening[message.token] = {}
        self._desk.hold(ticket, self._opening[message.token], message)
        self._ledger.intend(BeginRun(message))

    def cannot_begin(self, error: DistckptError) -> None:
        """Tell those who wait for a run to begin why it does not. It may begin all the same: they may ask again."""
        for waiting in self._opening.values():
            self._desk.answer_shelf(waiting, Refused(error))

    def superseded(self, entry: Entry) -> StaleRunError:
        """What everything of the run before ends with, now that ``entry`` has begun another."""
        old = self.current.number if self.current is not None else entry.state.run - 1
        return StaleRunError(self._desk.directory, old, entry.state.run)

    def begun(self, begin: BeginRun, entry: Entry) -> None:
        """The run is in the log: it is the current one, and its processes that have reported already are answered."""
        self._remember(entry.state)
        self._settle(begin.first)
        for ticket, message in list(self._opening.pop(begin.first.token).items()):
            self._register(ticket, message)

    def refused(self, begin: BeginRun, reason: str) -> None:
        """No reader would take an entry that begins this run: its processes are told."""
        error = CoordinatorError(f"{self._desk.directory}: the run cannot begin: {reason}")
        self._desk.answer_shelf(self._opening.pop(begin.first.token), Refused(error))

    def _remember(self, state: State) -> None:
        """Whoever comes with this token once another run is the current one belongs to an older one."""
        if state.run:
            self._numbers[state.run_token] = state.run
        if len(self._numbers) > REMEMBERED_TOKENS:
            del self._numbers[next(iter(self._numbers))]

    def _settle(self, first: OpenRun) -> Run:
        number = self._ledger.state.run
        self.current = Run(number, first.world_size, first.name, first.retention, first.save_timeout)
        return self.current

    def _register(self, ticket: int, message: OpenRun) -> None:
        wrong = _wrong_rank(message.rank, message.world_size) or self._disagreement(message)
        if wrong:
            self._desk.answer(ticket, Refused(CoordinatorError(f"{self._desk.directory}: {wrong}")))
            return
        run = self.current or self._settle(message)
        run.hosts[message.rank] = message.host
        run.left.discard(message.rank)
        ledger = self._ledger
        recovers_at = ledger.recovers_at if run.retention.keep is None else None  # rules need nothing of this
        self._desk.answer(ticket, RunOpened(run.number, ledger.epoch, recovers_at, ledger.state.origin))

    def _disagreement(self, message: OpenRun) -> str:
        run = self.current
        if run is None:
            return ""
        if message.world_size != run.world_size:
            return f"rank {message.rank} counts {message.world_size} ranks, but others of its run {run.world_size}"
        if message.name != run.name:
            return f"rank {message.rank} saves as {message.name!r}, but others of its run as {run.name!r}"
        return ""


def turned_away(opening: OpenRun, state: State, directory: str, *, whole: bool) -> CoordinatorError | None:
    """Why a process that opens its run again must not be served with a log in this state; None if it may be.

    Its run is superseded, or this is not the directory that it was opened in. ``whole`` says that no entry of the log
    is unreadable: then it knows every run that there has been.
    """
    if not opening.run:
        return None
    if opening.origin not in ("", state.origin):
        return DirectoryLostError(directory, opening.run, state.run)
    if opening.run > state.run:
        return DirectoryLostError(directory, opening.run, state.run) if whole else None
    return StaleRunError(directory, opening.run, state.run) if opening.token != state.run_token else None


def _wrong_rank(rank: int, world_size: int) -> str:
    return "" if 0 <= rank < world_size else f"rank {rank} is not one of {world_size} ranks"
