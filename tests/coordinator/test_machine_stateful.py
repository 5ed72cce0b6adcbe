"""Several machines on one log, in whatever order Hypothesis thinks of: the promises hold after every step."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distckpt.coordinator.machine.actions import (
    Action,
    Answer,
    Append,
    Appended,
    AppendRefused,
    AppendUnknown,
    Asked,
    CollectGarbage,
    Delete,
    Deleted,
    Event,
    Exit,
    LeasesRead,
    MakePlan,
    NameTaken,
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
    RoomMade,
    Seal,
    Sealed,
    StepFailed,
    TailRead,
    Tick,
    WritePage,
)
from distckpt.coordinator.machine.machine import Machine
from distckpt.coordinator.messages import (
    AwaitPlan,
    Committed,
    Describe,
    FillFrom,
    FinishWith,
    FromRank,
    Heartbeat,
    Join,
    Joined,
    KeyMatch,
    MakeRoom,
    MatchWith,
    OpenRun,
    Pin,
    Planned,
    Receipt,
    Reply,
    Request,
    Restore,
    Restored,
    RunOpened,
    ShardReceipt,
    Status,
)
from distckpt.errors import DamagedError, PlanError, SaveError
from distckpt.format.json.paging import Sizes, ref_of
from distckpt.format.names import attempt_epoch
from distckpt.keep import Retention
from distckpt.testing.history import (
    INDEX,
    MANIFEST,
    Agreed,
    Filled,
    Finished,
    Held,
    History,
    LetGo,
    Matched,
    Piece,
    Promised,
    ReadWhole,
    Whole,
)
from distckpt.testing.promises import PROMISES
from distckpt.testing.sim_store import SimulatedLease, SimulatedPlan, SimulatedStore, describe, make_plan, record_of
from tests.support.part import examples

WORLD = 2
RETENTION = {"one": Retention(None), "two": Retention(1), "three": Retention(2)}
FAULTS = st.sampled_from(["", "", "", "", "lost", "unknown", "late", "refused"])
PICK = st.integers(0, 1 << 20)
TO = st.sampled_from([-1, -1, -1, 0, 1])


def join_of(said: FromRank) -> Join:
    return cast(Join, said.request)


FITTING = KeyMatch(b"\x00", 1)
OTHERS = (FITTING, FITTING, FITTING, KeyMatch(b"\x01", 1), KeyMatch(b"\x01", 0), KeyMatch(b"\x00", 1, ("a",), (), 1))


class Shell:
    """A coordinator process: its machine, and what it has been asked for and not done yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.machine = Machine("mem://run", name, sizes=Sizes(1, 2, 4, 2))
        self.pending: list[Action] = []


class Coordinators(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.history = History(0)
        self.store = SimulatedStore(self.history)
        self.shells: list[Shell] = []
        self.time = 0.0
        self.asked: list[Request] = []
        self.tickets: dict[int, Request] = {}
        self.runs: dict[str, int] = {}
        self.late: list[tuple[str, Append]] = []
        self.tried: set[str] = set()
        self.joined: list[tuple[FromRank, Joined]] = []
        self.planned: list[tuple[FromRank, str, Planned]] = []
        self.restoring: list[tuple[FromRank, MatchWith | FillFrom | FinishWith]] = []
        self.restores = [0] * WORLD
        self.written: set[tuple[str, int]] = set()
        self.started = 0
        self.joins: dict[tuple[int, int], dict[int, int | None]] = {}
        self.ahead: dict[tuple[int, int], int] = {}
        self.token = "one"

    # ---- coordinators ------------------------------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        self.start()
        while self.shells[0].pending:
            self._perform(self.shells[0], self.shells[0].pending.pop(0), "")
        for token, rank in (("one", 0), ("one", 1)):
            self.open_run(token, rank, 0)
            while self.shells[0].pending:
                self._perform(self.shells[0], self.shells[0].pending.pop(0), "")

    def start(self) -> None:
        self.started += 1
        shell = Shell(f"{self.started}")
        self.shells.append(shell)
        self._feed(shell, Tick())

    @precondition(lambda self: any(shell.pending for shell in self.shells))
    @rule(which=PICK, fault=FAULTS)
    def perform(self, which: int, fault: str) -> None:
        waiting = [(shell, action) for shell in self.shells for action in shell.pending]
        shell, action = waiting[which % len(waiting)]
        shell.pending.remove(action)
        self._perform(shell, action, fault)

    @precondition(lambda self: any(shell.pending for shell in self.shells))
    @rule(which=PICK)
    def perform_all(self, which: int) -> None:
        shell = self.shells[which % len(self.shells)]
        for _ in range(20):
            if shell.pending:
                self._perform(shell, shell.pending.pop(0), "")

    def wait(self, seconds: float) -> None:
        self.time += seconds
        for shell in self.shells:
            self._feed(shell, Tick())

    @rule(
        what=st.sampled_from(
            ["start", "start", "crash", "late", "wait", "pin", "unpin", "status", "full", "open", "supersede"]
        ),
        which=PICK,
        to=PICK,
    )
    def disturb(self, what: str, which: int, to: int) -> None:
        if what == "start" and len(self.shells) < 3:
            self.start()
        elif what == "crash" and len(self.shells) > 1:
            self.shells.pop(which % len(self.shells))
        elif what == "late" and self.late:
            who, append = self.late.pop(which % len(self.late))
            self.store.log.put(who, append.entry, heard=False)
        elif what == "wait":
            self.wait([0.5, 5.0, 31.0][which % 3])
        elif what in ("pin", "unpin"):
            self._ask(to, Pin(1 + which % 5, what == "pin"))
        elif what == "status":
            self._ask(to, Status())
            self._ask(to, FromRank(max(self.runs.values(), default=0), 0, Heartbeat()))
        elif what == "full":
            self._ask(to, FromRank(max(self.runs.values(), default=0), which % WORLD, MakeRoom()))
        elif what in ("open", "supersede"):
            self.open_run(["one", "two", "three"][which % 3] if what == "supersede" else self.token, which % WORLD, to)

    # ---- ranks -----------------------------------------------------------------------------------------------------------

    def open_run(self, token: str, rank: int, to: int) -> None:
        self.token = token
        run = self.runs.get(f"{token}/{rank}", 0)
        self._ask(to, OpenRun(token, rank, WORLD, "h", "ckpt", RETENTION[token], 20.0, run))

    @rule(to=TO)
    def save_at_once(self, to: int) -> None:
        self._save(1, to, 6, again=False)

    @rule(
        ahead=st.integers(-1, 1),
        to=TO,
        stages=st.sampled_from([6, 6, 6, 6, 6, 6, 5, 4, 3, 2, 1]),
        again=st.booleans(),
    )
    def save(self, ahead: int, to: int, stages: int, again: bool) -> None:
        self._save(ahead, to, stages, again=again)

    def _save(self, ahead: int, to: int, stages: int, *, again: bool) -> None:
        """Both ranks go through the first ``stages`` of a save; ``again`` saves a number that was saved before."""
        self._work(to)
        for rank in range(WORLD):
            self.open_run(self.token, rank, to)
        self._work(to)
        run = self.runs.get(f"{self.token}/0", 0)
        counted = [
            join_of(said).order - self.ahead.get((run, said.rank), 0) for said, _ in self.joined if said.run == run
        ]
        order = max(1, max(counted, default=0) + ahead)
        number = order - 1 if again and order % 2 else order
        for stage in (self._join, self._describe, self._work, self._await_plan, self._land, self._work)[:stages]:
            for rank in range(WORLD):
                stage(to, run, rank, order + self.ahead.get((run, rank), 0), number)

    @precondition(lambda self: self.runs)
    @rule(rank=st.integers(0, WORLD - 1), to=TO)
    def save_alone(self, rank: int, to: int) -> None:
        """One rank saves what the others do not: it counts one save more than they do from now on."""
        run = self.runs.get(f"{self.token}/{rank}", 0)
        if not any(self.ahead.get((run, one), 0) for one in range(WORLD)):
            latest = max([join_of(said).order for said, _ in self.joined if said.run == run], default=0)
            self._join(to, run, rank, latest + 1, 100 + latest)
            self.ahead[run, rank] = 1

    def _join(self, to: int, run: int, rank: int, order: int, number: int) -> None:
        before = self.joins.setdefault((run, rank), {})
        earlier = tuple((one, of) for one, of in sorted(before.items()) if one < order)
        before[order] = number
        self._ask(to, FromRank(run, rank, Join(order, number, "8", earlier=earlier)))

    def _describe(self, to: int, run: int, rank: int, order: int, number: int) -> None:
        for said, joined in self.joined[-2:]:
            if (said.run, said.rank, join_of(said).order) == (run, rank, order) and joined.describe:
                self._ask(to, FromRank(run, rank, Describe(joined.attempt, "8", describe(8))))

    def _work(self, to: int, *_: int) -> None:
        shell = self.shells[to % len(self.shells)]
        for _ in range(6):
            if shell.pending:
                self._perform(shell, shell.pending.pop(0), "")

    def _await_plan(self, to: int, run: int, rank: int, order: int, number: int) -> None:
        for said, joined in self.joined[-2:]:
            if (said.run, said.rank, join_of(said).order) == (run, rank, order):
                self._ask(to, FromRank(run, rank, AwaitPlan(joined.attempt)))

    def _land(self, to: int, run: int, rank: int, order: int, number: int) -> None:
        for said, attempt, planned in self.planned[-2:]:
            if (said.run, said.rank, join_of(said).order) == (run, rank, order):
                self._send_receipt(to, said, attempt, planned)

    @precondition(lambda self: self.joined)
    @rule(which=PICK, to=PICK)
    def rejoin_staged(self, which: int, to: int) -> None:
        if self.planned:
            said, attempt, planned = self.planned[which % len(self.planned)]
            join = replace(join_of(said), plan=planned.plan, staged=True, attempt=attempt)
            self._ask(to, FromRank(said.run, said.rank, join))

    @precondition(lambda self: self.joined)
    @rule(which=PICK, to=PICK, count=st.integers(1, 4))
    def describe_and_await_plan(self, which: int, to: int, count: int) -> None:
        for said, joined in self.joined[-1 - which % len(self.joined) :][:count]:
            join = join_of(said)
            rows = next((plan.rows for old, _, plan in self.planned if old.run == said.run and old.rank == said.rank
                         and join_of(old).order == join.order and join.staged), None)  # fmt: skip
            if joined.describe:
                self._ask(to, FromRank(said.run, said.rank, Describe(joined.attempt, "8", describe(8), rows)))
            self._ask(to, FromRank(said.run, said.rank, AwaitPlan(joined.attempt)))

    @precondition(lambda self: self.planned)
    @rule(which=PICK, to=PICK, count=st.integers(1, 4))
    def land(self, which: int, to: int, count: int) -> None:
        for said, attempt, planned in self.planned[-1 - which % len(self.planned) :][:count]:
            self._send_receipt(to, said, attempt, planned)

    def _send_receipt(self, to: int, said: FromRank, attempt: str, planned: Planned) -> None:
        if (attempt, said.rank) not in self.written:
            self.written.add((attempt, said.rank))
            join = join_of(said)
            piece = Piece(said.run, join.order, cast(int, join.number), said.rank, planned.rows, 8)
            self.store.put(attempt, str(said.rank), piece, self.time)
        shard = ShardReceipt(0, 1, 1, len(planned.rows) // 4, b"", b"", b"", b"")
        self._ask(to, FromRank(said.run, said.rank, Receipt(attempt, (shard,))))

    @precondition(lambda self: self.runs)
    @rule(which=PICK, to=PICK, refused=st.sampled_from(["", "", "bad"]))
    def restore(self, which: int, to: int, refused: str) -> None:
        if which % 3 and self.restoring:
            self.report_restored(which, to, refused)
            return
        rank, partial = which % WORLD, which % 5 == 0
        restore = Restore(self._order(rank, new=which % 7 == 0), None, partial=partial)
        self._ask(to, FromRank(sorted(self.runs.values())[which % len(self.runs)], rank, restore))

    def _order(self, rank: int, *, new: bool) -> int:
        """How many restores the rank has called, one more if it is a ``new`` one."""
        self.restores[rank] += new
        return self.restores[rank]

    def report_restored(self, which: int, to: int, refused: str) -> None:
        asked, reply = self.restoring[which % len(self.restoring)]
        first = cast(Restore, asked.request)
        report = Restore(first.order, None, reply.record.attempt, refused, partial=first.partial, round=reply.round)
        if isinstance(reply, FillFrom):
            report = replace(report, stage="fill")
        elif isinstance(reply, FinishWith):
            report = replace(report, stage="finish", refused="")
        else:
            report = replace(report, keys=OTHERS[which % len(OTHERS)])
        self._ask(to, FromRank(asked.run, asked.rank, report))

    @precondition(lambda self: self.restoring)
    @rule(to=PICK, which=PICK, refused=st.sampled_from(["", "", "", "bad"]))
    def restore_together(self, to: int, which: int, refused: str) -> None:
        """Both ranks go through one restore, doing what they were told last."""
        orders = [self._order(rank, new=which % 2 == 0) for rank in range(WORLD)]
        for stage in ("ask", "match", "fill", "finish"):
            for rank in range(WORLD):
                mine = [at for at, (said, _) in enumerate(self.restoring) if said.rank == rank]
                if stage == "ask":
                    self._ask(to, FromRank(max(self.runs.values()), rank, Restore(orders[rank], None)))
                elif mine:
                    self.report_restored(mine[-1], to, refused if stage == "fill" else "")

    @precondition(lambda self: self.asked)
    @rule(which=PICK, to=PICK)
    def repeat_anything(self, which: int, to: int) -> None:
        self._ask(to, self.asked[which % len(self.asked)])

    @precondition(lambda self: self.store.log.entries)
    @rule(which=PICK, reader=st.sampled_from(["r1", "r2"]), take=st.booleans())
    def lease(self, which: int, reader: str, take: bool) -> None:
        self.drop_a_lease(reader)
        if not take:
            return
        entry = self.store.log.newest_entry()
        assert entry is not None
        records = (*entry.state.active, *entry.state.preserved)
        if records:
            attempt = records[which % len(records)].attempt
            self.store.leases[reader] = SimulatedLease(attempt, 60.0, 0, 0.0, self.time)
            self.history.add(Held(reader, attempt))

    def drop_a_lease(self, reader: str) -> None:
        if self.store.leases.pop(reader, None) is not None:
            self.history.add(LetGo(reader))

    # ---- effects -----------------------------------------------------------------------------------------------------------

    def _ask(self, to: int, request: Request) -> None:
        shell = self.shells[to % len(self.shells)]
        ticket = len(self.tickets)
        self.tickets[ticket] = request
        self.asked.append(request)
        if isinstance(request, FromRank) and isinstance(request.request, Restore):
            said = request.request
            if said.keys is not None:
                self.history.add(Matched(request.run, said.round, request.rank, said.tried))
            elif said.stage == "fill" and not said.refused:
                self.history.add(ReadWhole(request.run, said.round, request.rank, said.tried))
        self._feed(shell, Asked(ticket, request))

    def _feed(self, shell: Shell, event: Event) -> None:
        answered = set()
        for action in shell.machine.step(event, 1e6 + self.time, self.time):
            if isinstance(action, Answer):
                assert action.ticket not in answered
                answered.add(action.ticket)
                self._hear(shell, self.tickets[action.ticket], action.reply)
            else:
                shell.pending.append(action)

    def _hear(self, shell: Shell, request: Request, reply: Reply) -> None:
        if isinstance(reply, Committed):
            self.history.add(Promised(shell.name, 0, reply.record))
        elif isinstance(reply, RunOpened) and isinstance(request, OpenRun):
            self.runs[f"{request.token}/{request.rank}"] = reply.run
        elif isinstance(request, FromRank):
            self._hear_of_rank(shell, request, reply)

    def _hear_of_rank(self, shell: Shell, said: FromRank, reply: Reply) -> None:
        match said.request, reply:
            case Join(), Joined():
                self.joined.append((said, reply))
            case AwaitPlan(attempt), Planned():
                join = next(old for old, joined in reversed(self.joined)
                            if joined.attempt == attempt and old.rank == said.rank)  # fmt: skip
                self.planned.append((join, attempt, reply))
            case Restore(), MatchWith() | FillFrom() | FinishWith():
                self.restoring.append((said, reply))
                if isinstance(reply, FillFrom):
                    self.history.add(Filled(said.run, reply.round, said.rank, reply.record.attempt, WORLD))
                elif isinstance(reply, FinishWith):
                    self.history.add(Finished(said.run, reply.round, said.rank, reply.record.attempt, WORLD))
            case Restore(), Restored(record):
                self.history.add(Agreed(said.run, reply.round, said.rank, record))

    def _perform(self, shell: Shell, action: Action, fault: str) -> None:
        match action:
            case ReadTail():
                self._feed(shell, self._tail())
            case Append():
                self._append(shell, action, fault)
            case ReadNewest():
                self._feed(shell, NewestRead(None, "no answer") if fault else NewestRead(self.store.log.newest()))
            case ReadPages(asked, pages):
                found = {
                    page.id: self.store.pages[page.id] for page in pages if not fault and page.id in self.store.pages
                }
                failed = {page.id: DamagedError(page.id, "no answer") for page in pages if page.id not in found}
                self._feed(shell, PagesRead(asked, found, failed))
            case WritePage(page, of, records):
                if fault != "unknown":
                    self.store.put_page(page, records)
                self._feed(shell, PageWritten(page, None if fault else ref_of(page, of, records, 1, 1)))
            case MakePlan():
                try:
                    plan = make_plan(action.number, action.descriptions, action.staged, action.attempt)
                except PlanError as error:
                    self._feed(shell, StepFailed(action.attempt, error))
                else:
                    self._feed(shell, PlanMade(action.attempt, plan))
            case Seal():
                self._seal(shell, action, fault)
            case ReadLeases():
                attempts = frozenset(lease.attempt for lease in self.store.leases.values())
                self._feed(shell, LeasesRead(attempts, "cannot" if fault else ""))
            case Delete(records):
                for record in records if not fault else ():
                    self._erase(shell, record.attempt)
                self._feed(shell, Deleted(tuple(record.attempt for record in records) if not fault else ()))
            case CollectGarbage(known=known, epoch=epoch, failed=failed, urgent=urgent, pages=pages):
                known |= {record.attempt for page in pages for record in self.store.pages.get(page.id, ())}
                for page_id in self.store.pages.keys() - self.store.referred():
                    if attempt_epoch(page_id) < epoch or page_id in action.dropped:
                        self.store.erase_page(shell.name, page_id)
                for attempt in list(self.store.attempts):
                    if attempt in failed or (attempt_epoch(attempt) < epoch and attempt not in known):
                        self._erase(shell, attempt)
                if urgent:
                    self._feed(shell, RoomMade())
            case Publish(entry):
                self.store.log.prune(entry.seq)
                self._feed(shell, Published(entry))
            case Exit():
                self.shells.remove(shell)
                if not self.shells:
                    self.start()

    def _tail(self) -> TailRead:
        entry = self.store.log.newest_entry()
        if entry is None:
            return TailRead(0, None)
        whole = {attempt: self.store.complete(attempt) for attempt in self.store.attempts}
        complete = [
            record_of("ckpt", attempt, found)
            for attempt, found in whole.items()
            if found is not None and attempt_epoch(attempt) == entry.epoch
        ]
        return TailRead(entry.seq, entry, tuple(complete))

    def _append(self, shell: Shell, action: Append, fault: str) -> None:
        entry = action.entry
        is_first = entry.commit_id not in self.tried
        self.tried.add(entry.commit_id)
        if fault == "refused" and entry.kind == "commit" and is_first:  # whether a reader would take it does not change
            self._feed(shell, AppendRefused(entry, "too long to be read"))
        elif fault in ("unknown", "late"):
            self.late += [(shell.name, action)] if fault == "late" else []
            self._feed(shell, AppendUnknown(entry, "no answer"))
        elif self.store.log.put(shell.name, entry) and fault != "lost":
            self._feed(shell, Appended(entry, self.store.log.newest()))
        else:
            self._feed(shell, NameTaken(entry, self.store.log.entries.get(entry.seq), self.store.log.newest()))

    def _seal(self, shell: Shell, action: Seal, fault: str) -> None:
        plan = cast(SimulatedPlan, action.plan)
        whole = Whole(action.number, dict(enumerate(plan.owned)), plan.chunks, action.time)
        if fault != "unknown":
            self.store.put(action.attempt, INDEX, whole, self.time)
            self.store.put(action.attempt, MANIFEST, whole, self.time)
        failed = StepFailed(action.attempt, SaveError(action.number, "no answer"))
        self._feed(shell, failed if fault else Sealed(action.attempt, 1, 1, 8))

    def _erase(self, shell: Shell, attempt: str) -> None:
        for name in self.store.names(attempt):
            self.store.erase(shell.name, attempt, name)

    # ---- what always holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        for name in ("G1", "G2", "G3", "G4", "G5", "G6", "G7"):
            assert PROMISES[name](self.history) == [], name

    @invariant()
    def nobody_spins(self) -> None:
        for shell in self.shells:
            deadline = shell.machine.next_deadline()
            assert deadline is None or deadline > self.time or any(isinstance(a, Append) for a in shell.pending)


Coordinators.TestCase.settings = settings(
    max_examples=examples(150),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # Shrinking would outlast the time limit of a test; the steps are printed as they are.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
test_promises_hold_in_any_order = Coordinators.TestCase
