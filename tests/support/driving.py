"""Drives one machine by hand: its actions wait until a test performs them, honestly or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar, cast

import msgspec

from distckpt.coordinator.machine.actions import (
    Action,
    Answer,
    Append,
    Appended,
    Asked,
    CollectGarbage,
    Delete,
    Deleted,
    DeleteReports,
    Event,
    Exit,
    LeasesRead,
    MakePlan,
    NewestRead,
    PagesRead,
    PageWritten,
    PlanMade,
    Publish,
    Published,
    ReadLeases,
    ReadNewest,
    ReadPages,
    ReadTail,
    Seal,
    Sealed,
    SkipsTold,
    TailRead,
    TellSkips,
    Tick,
    WritePage,
)
from distckpt.coordinator.machine.following import Followed, Following
from distckpt.coordinator.machine.keeping import GARBAGE_PAUSES
from distckpt.coordinator.machine.machine import Machine
from distckpt.coordinator.messages import (
    AwaitPlan,
    Committed,
    Describe,
    FromRank,
    Join,
    Joined,
    KeyMatch,
    OpenRun,
    Planned,
    Receipt,
    Refused,
    Reply,
    Request,
    Restore,
    RunOpened,
)
from distckpt.errors import DamagedError
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.json.log import CheckpointRecord, Entry
from distckpt.format.json.paging import SIZES, Records, Sizes, ref_of
from distckpt.format.json.report import Report, Reported
from distckpt.format.names import report_path
from distckpt.keep import Retention
from distckpt.testing.sim_store import SimulatedPlan, describe, make_plan

DIRECTORY = "mem://run"
TIMEOUT = 30.0

_reports = itertools.count()

SomeAction = TypeVar("SomeAction", bound=Action)


class Driver:
    """A machine, the log that it shares with other drivers, and what it has asked for and not been given."""

    def __init__(
        self,
        log: dict[int, Entry] | None = None,
        claim: str = "a",
        idle_timeout: float | None = None,
        sizes: Sizes = SIZES,
    ) -> None:
        self.log = {} if log is None else log
        self.pages: dict[str, Records] = {}
        self.sizes = sizes
        self.machine = Machine(DIRECTORY, claim * 32, idle_timeout=idle_timeout, sizes=sizes)
        self.now = 100000.0
        self.mono = 50.0
        self.pending: list[Action] = []
        self.done: list[Action] = []
        self.replies: dict[int, Reply] = {}
        self.leased: frozenset[str] = frozenset()
        self.groups: dict[str, Following] = {}
        self.reports: list[Reported] = []
        self.complete: tuple[CheckpointRecord, ...] = ()
        self.joins: dict[tuple[int, int], dict[int, int | None]] = {}
        self._tickets = 0

    # ---- stepping ----------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> list[Action]:
        actions = self.machine.step(event, self.now, self.mono)
        for action in actions:
            if isinstance(action, Answer):
                assert action.ticket not in self.replies, "a ticket is answered once"
                self.replies[action.ticket] = action.reply
            else:
                self.pending.append(action)
        return actions

    def ask(self, request: Request) -> int:
        self._tickets += 1
        self.feed(Asked(self._tickets, request))
        return self._tickets

    def answer(self, request: Request) -> Reply | None:
        """The answer that a request gets at once, or None."""
        return self.replies.get(self.ask(request))

    def settled(self, request: Request) -> Reply | None:
        """The answer that it has got when everything that was asked for has been done."""
        ticket = self.ask(request)
        self.settle()
        return self.replies.get(ticket)

    def calm(self) -> Driver:
        """Let the looks for garbage pass that come soon after a start: there is none."""
        for pause in GARBAGE_PAUSES[:-1]:
            self.wait(pause)
        return self

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.mono += seconds
        self.feed(Tick())

    # ---- effects -----------------------------------------------------------------------------------------------------

    def take(self, kind: type[SomeAction]) -> SomeAction:
        """The oldest pending action of this kind, which the test performs itself."""
        action = next((action for action in self.pending if isinstance(action, kind)), None)
        assert action is not None, f"no {kind.__name__} among {self.pending}"
        self.pending.remove(action)
        return action

    def has(self, kind: type[Action]) -> bool:
        return any(isinstance(action, kind) for action in self.pending)

    def settle(self, *but: type[Action]) -> None:
        """Perform everything honestly, except actions of the kinds in ``but``, until nothing is left to do."""
        while True:
            action = next((action for action in self.pending if not isinstance(action, but)), None)
            if action is None:
                return
            self.pending.remove(action)
            self.perform(action)

    def perform(self, action: Action) -> None:
        self.done.append(action)
        match action:
            case ReadTail():
                newest = max(self.log, default=0)
                self.feed(TailRead(newest, self.log.get(newest), self.complete))
            case Append(entry):
                assert entry.seq not in self.log
                self.log[entry.seq] = entry
                self.feed(Appended(entry, max(self.log)))
            case ReadNewest():
                self.feed(NewestRead(max(self.log, default=0)))
            case ReadPages(asked, pages):
                found = {page.id: self.pages[page.id] for page in pages if page.id in self.pages}
                failed = {page.id: DamagedError(page.id, "missing") for page in pages if page.id not in found}
                self.feed(PagesRead(asked, found, failed))
            case WritePage(page, of, records):
                self.pages[page] = records
                self.feed(PageWritten(page, ref_of(page, of, records, 1, 1)))
            case MakePlan():
                plan = make_plan(action.number, action.descriptions, action.staged, "spin")
                self.feed(PlanMade(action.attempt, plan))
            case Seal():
                self.feed(Sealed(action.attempt, 11, 12, 13))
            case ReadLeases(state):
                alive = state.alive()
                groups = tuple(
                    replace(group, waiting=tuple(attempt for attempt in group.waiting if attempt in alive))
                    for group in self.groups.values()
                )
                followed = Followed(groups, state.commits)
                self.feed(LeasesRead(self.leased, "", frozenset(), followed, tuple(self.reports)))
            case TellSkips(skips):
                for name, records in skips.items():
                    gone = {record.attempt for record in records}
                    left = tuple(attempt for attempt in self.groups[name].waiting if attempt not in gone)
                    self.groups[name] = replace(self.groups[name], waiting=left)
                self.feed(SkipsTold(done=True))
            case DeleteReports(reports):
                self.reports = [one for one in self.reports if one not in reports]
            case Delete(records, paths):
                self.reports = [one for one in self.reports if one.path not in paths]
                self.feed(Deleted(tuple(record.attempt for record in records)))
            case Publish(entry):
                self.feed(Published(entry))
            case CollectGarbage() | Exit():
                pass

    def lead(self) -> Driver:
        self.feed(Tick())
        self.settle()
        assert self.machine.leading
        return self

    def restarted(self, claim: str) -> Driver:
        """Another coordinator on the same log."""
        other = Driver(self.log, claim, sizes=self.sizes)
        other.pages = self.pages
        other.now, other.mono = self.now, self.mono
        return other.lead()

    # ---- what readers do ---------------------------------------------------------------------------------------------

    def report(self, attempt: str, **metrics: float) -> Reported:
        """An evaluation reports."""
        report = Report(1, attempt, metrics, 1.0)
        reported = Reported(report_path(attempt, f"{next(_reports):032x}"), report)
        self.reports.append(reported)
        return reported

    # ---- what ranks do -------------------------------------------------------------------------------------------------

    def open(
        self,
        world: int = 1,
        token: str = "job",
        retention: Retention | None = None,
        run: int = 0,
        ranks: Iterable[int] | None = None,
    ) -> int:
        """All ranks report; the run's number."""
        tickets = [
            self.ask(OpenRun(token, rank, world, f"host{rank}", "ckpt", retention or Retention(), TIMEOUT, run))
            for rank in (range(world) if ranks is None else ranks)
        ]
        self.settle()
        opened = {cast(RunOpened, self.replies[ticket]).run for ticket in tickets}
        assert len(opened) == 1
        return opened.pop()

    def join(self, run: int, rank: int, order: int, number: int | None, **more: object) -> Reply | None:
        """A rank joins; it says that it is still busy with every save that it has joined before."""
        saves = self.joins.setdefault((run, rank), {})
        earlier = tuple((before, of) for before, of in saves.items() if before < order)
        saves[order] = number
        fields = {"digest": "d", "earlier": earlier, **more}
        return self.answer(FromRank(run, rank, Join(order, number, **fields)))  # type: ignore[arg-type]

    def plan(
        self, run: int, world: int, order: int, number: int | None, chunks: int = 8
    ) -> dict[int, tuple[str, Planned]]:
        """All ranks join, describe if asked, and learn the plan: attempt and plan of each."""
        attempts = {}
        for rank in range(world):
            joined = cast(Joined, self.join(run, rank, order, number, digest=str(chunks)))
            attempts[rank] = joined.attempt
            if joined.describe:
                self.answer(FromRank(run, rank, Describe(joined.attempt, str(chunks), describe(chunks))))
        tickets = {rank: self.ask(FromRank(run, rank, AwaitPlan(attempts[rank]))) for rank in range(world)}
        self.settle()
        return {rank: (attempts[rank], cast(Planned, self.replies[ticket])) for rank, ticket in tickets.items()}

    def land(self, run: int, planned: dict[int, tuple[str, Planned]]) -> list[int]:
        """All ranks send their receipts; the tickets."""
        return [self.ask(receipt(run, rank, attempt, len(plan.rows) // 4)) for rank, (attempt, plan) in planned.items()]

    def save(self, run: int, world: int, order: int, number: int) -> CheckpointRecord:
        """One whole save; its record."""
        tickets = self.land(run, self.plan(run, world, order, number))
        self.settle()
        replies = {cast(Committed, self.replies[ticket]).record.attempt for ticket in tickets}
        assert len(replies) == 1
        return cast(Committed, self.replies[tickets[0]]).record


def receipt(run: int, rank: int, attempt: str, rows: int) -> FromRank:
    return FromRank(run, rank, Receipt(attempt, (ShardReceipt(0, 100, 0, rows, b"", b"", b"", b""),)))


FITS = KeyMatch(b"\x00", 3)


def matched(run: int, rank: int, attempt: str, keys: KeyMatch = FITS, **more: Any) -> FromRank:
    """A rank has found out how its objects match a checkpoint, which changes nothing."""
    return reported(run, rank, attempt, keys=keys, **more)


def filled(run: int, rank: int, attempt: str, refused: str = "", **more: Any) -> FromRank:
    """A rank has read all of a checkpoint, or could not."""
    return reported(run, rank, attempt, refused, stage="fill", **more)


def finished(run: int, rank: int, attempt: str, **more: Any) -> FromRank:
    """A rank has handed its objects what it had read."""
    return reported(run, rank, attempt, stage="finish", **more)


def reported(run: int, rank: int, attempt: str, refused: str = "", **more: Any) -> FromRank:
    """What came of a checkpoint on a rank, in the first round of the first coordinator if nothing else is said."""
    fields = {"order": 0, "which": None, "round": "1-1", **more}
    return FromRank(run, rank, Restore(tried=attempt, refused=refused, **fields))


def simulated_plan(driver: Driver, world: int, chunks: int, staged: dict[int, bytes] | None = None) -> SimulatedPlan:
    return make_plan(1, dict.fromkeys(range(world), describe(chunks)), staged or {}, "spin")


def refusal(reply: Reply | None) -> Exception:
    assert isinstance(reply, Refused), reply
    return reply.error


def foreign(entry: Entry, epoch: int) -> Entry:
    return msgspec.structs.replace(entry, epoch=epoch, commit_id="foreign")


def record(number: int, attempt: str, time: float = 100.0, **more: Any) -> CheckpointRecord:
    return CheckpointRecord(
        name="ckpt", number=number, attempt=attempt, manifest_size=1, manifest_crc32c=1, time=time, world_size=1,
        nbytes=1, **more,
    )  # fmt: skip


def attempt_of(epoch: int, made: int) -> str:
    return f"e{epoch}-{made:08x}{'0' * 24}"


def last(driver: Driver) -> Entry:
    return driver.log[max(driver.log)]


def kinds(driver: Driver) -> list[str]:
    return [driver.log[seq].kind for seq in sorted(driver.log)]


def opening(driver: Driver, token: str = "job") -> tuple[int, Entry]:
    """A ticket whose entry is in flight."""
    ticket = driver.ask(OpenRun(token, 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    return ticket, driver.take(Append).entry


def saved_three(world: int = 2) -> tuple[Driver, int, list[CheckpointRecord]]:
    driver = Driver().lead()
    run = driver.open(world)
    return driver, run, [driver.save(run, world, order, 10 * order) for order in (1, 2, 3)]
