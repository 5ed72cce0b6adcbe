"""The coordinator as a pure state machine: events in, actions out. No clock, no randomness, no input or output.

Parts: the ledger appends to the log, runs know the job's incarnations, saves and restores their rounds, stops who asked
everyone to stop, keeping applies retention. All of them share one desk, where tickets wait for answers and actions are
collected. What comes in goes to the parts in ``_take`` and ``_serve``; what a log entry leads to stands in ``_follow_up``.
"""

from __future__ import annotations

from itertools import chain

from distckpt.coordinator.machine.actions import (
    Action,
    Appended,
    AppendRefused,
    AppendUnknown,
    Asked,
    Deleted,
    Event,
    Exit,
    Forgotten,
    LeasesRead,
    NameTaken,
    NewestRead,
    PagesRead,
    PageWritten,
    PlanMade,
    Published,
    RoomMade,
    Sealed,
    SkipsTold,
    StepFailed,
    TailRead,
    Tick,
)
from distckpt.coordinator.machine.answers import status
from distckpt.coordinator.machine.desk import Desk, Identities
from distckpt.coordinator.machine.ending import Ending
from distckpt.coordinator.machine.intentions import (
    BeginRun,
    Claim,
    Commit,
    Confirm,
    Discard,
    End,
    Forget,
    Intention,
    Reprieve,
    Retire,
    SetPin,
)
from distckpt.coordinator.machine.keeping import Keeping
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.library import Library
from distckpt.coordinator.machine.lookups import Lookups
from distckpt.coordinator.machine.publishing import Publishing
from distckpt.coordinator.machine.restores import Restores
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.machine.rounds import Phase
from distckpt.coordinator.machine.runs import Run, Runs, turned_away
from distckpt.coordinator.machine.saves import Saves
from distckpt.coordinator.machine.stops import Stops
from distckpt.coordinator.messages import (
    Accepted,
    AwaitPlan,
    AwaitPublished,
    AwaitStop,
    Committed,
    Describe,
    Fail,
    FromRank,
    Heartbeat,
    Join,
    Leave,
    MakeRoom,
    OpenRun,
    Pin,
    RankRequest,
    Receipt,
    Refused,
    Reply,
    Request,
    Restore,
    Status,
    Unknown,
)
from distckpt.errors import (
    CoordinatorError,
    CoordinatorUnavailableError,
    DistckptError,
    StorageError,
)
from distckpt.format.json.log import Entry, State
from distckpt.format.json.paging import SIZES, Sizes
from distckpt.format.names import entry_path

DEFAULT_NAME = "ckpt"
DESERTED_SECONDS = 5.0
"""How long a coordinator waits, once every rank has left, for a next run that would spare itself a start."""

TRIES = 5
"""How often an entry is tried, within seconds, until those who wait to be let in hear why they are not."""


class Machine:
    """One coordinator of ``directory``, from its claim to its end.

    ``claim_id`` must be unique for ever; every id that the machine makes is derived from it, so the same events always
    give the same actions. ``idle_timeout`` (seconds; None: never) is how long it goes on when nobody asks anything, at
    most; when every rank has left and nothing is to be deleted later, that is a few seconds. ``sizes`` are those of pages.
    """

    def __init__(
        self, directory: str, claim_id: str, *, idle_timeout: float | None = None, sizes: Sizes = SIZES
    ) -> None:
        identities = Identities(claim_id)
        self._desk = Desk(directory)
        self._idle_timeout = idle_timeout
        self._started = False
        self._end: DistckptError | None = None
        self._heard = 0.0
        self._early: dict[int, Request] = {}
        self._pinning: dict[int, None] = {}
        self._library = Library(self._desk)
        self._book = RoundBook()
        self._ledger = Ledger(self._desk, identities, self._follow_up, self._give_up, self._library, sizes)
        self._runs = Runs(self._desk, self._ledger)
        self._restores = Restores(self._desk, self._ledger, self._runs, self._library)
        self._stops = Stops(self._desk, self._runs)
        self._publishing = Publishing(self._desk)
        self._ending = Ending(self._desk, self._ledger, self._runs)
        self._keeping = Keeping(self._desk, self._ledger, self._runs, self._restores, self._book)
        self._lookups = Lookups(self._desk, self._ledger, self._library, self._book)
        self._saves = Saves(self._desk, self._ledger, identities, self._runs, self._book, self._keeping)

    @property
    def leading(self) -> bool:
        """Whether it has claimed its epoch and not ended."""
        return self._ledger.leading and self._end is None

    @property
    def epoch(self) -> int:
        """The claimed epoch, 0 before the claim."""
        return self._ledger.epoch

    @property
    def state(self) -> State:
        """The checkpoint state of the newest entry that counts."""
        return self._ledger.state

    def step(self, event: Event, now: float, mono: float) -> list[Action]:
        """What to do after ``event``.

        ``now`` is wall-clock time in epoch seconds, for records; ``mono`` is monotonic time in seconds, for deadlines.
        """
        self._desk.begin(now, mono)
        if self._end is not None:
            self._after_the_end(event, self._end)
            return self._desk.take()
        is_of_a_rank = isinstance(event, Asked) and isinstance(event.request, FromRank)
        if not self._started and not is_of_a_rank:
            self._started = True
            self._heard = mono
            self._ledger.start()
        self._take(event)
        self._pass_time()
        return self._desk.take()

    def next_deadline(self) -> float | None:
        """The monotonic time by which a Tick is wanted, or None."""
        if self._end is not None:
            return None
        parts = (self._saves, self._restores, self._keeping, self._ending)
        times = chain.from_iterable(part.deadlines() for part in parts)
        single = (self._ledger.deadline, self._stops.deadline, self._idle_at())
        return min(chain(times, (at for at in single if at is not None)), default=None)

    # ---- events ----------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        match event:
            case Asked(ticket, request):
                self._serve(ticket, request)
            case Forgotten(ticket):
                self._desk.forget(ticket)
            case PlanMade():
                self._saves.plan_made(event)
            case Sealed():
                self._saves.sealed(event)
            case StepFailed():
                self._saves.step_failed(event)
            case Appended():
                self._ledger.appended(event)
            case NameTaken():
                self._ledger.name_taken(event)
            case AppendUnknown():
                self._ledger.append_unknown(event)
                self._say_why(event)
            case AppendRefused():
                self._ledger.append_refused(event)
            case NewestRead():
                self._ledger.newest_read(event)
            case PagesRead():
                self._library.pages_read(event)
                self._ledger.go_on()
            case PageWritten():
                self._ledger.page_written(event)
                self._ledger.go_on()
            case TailRead():
                if self._is_wanted(event):
                    self._ledger.tail_read(event)
            case LeasesRead():
                self._keeping.leases_read(event)
                self._saves.readers_known()
            case SkipsTold():
                self._keeping.skips_told(event)
            case Deleted():
                self._keeping.deleted(event)
            case Published():
                self._publishing.published(event)
            case RoomMade():
                self._keeping.room_made()
            case Tick():
                pass

    def _say_why(self, event: AppendUnknown) -> None:
        """Nobody waits for an entry that cannot be written: who can ask again is told. It is tried again all the same."""
        if event.blocked is not None:
            error: StorageError = event.blocked
            for round in self._book:
                if round.phase is Phase.COMMITTING:
                    self._saves.overdue(round)
        elif self._ledger.tries >= TRIES:
            path = f"{self._desk.directory}/{entry_path(event.entry.seq)}"
            error = StorageError(path, f"could not be written, {self._ledger.tries} times over: {event.reason}")
        else:
            return
        self._runs.cannot_begin(error)
        self._ending.abandon(error)
        for waiting in (self._early, self._pinning):
            self._desk.answer_shelf(waiting, Refused(error))

    def _is_wanted(self, tail: TailRead) -> bool:
        """Whether to claim this log: not if all that are waiting belong to another one, or to a run that is over."""
        state = tail.entry.state if tail.entry is not None else State()
        whole = tail.seq == (tail.entry.seq if tail.entry is not None else 0)
        waiting = list(self._early.items())
        for ticket, request in waiting:
            if isinstance(request, OpenRun):
                error = turned_away(request, state, self._desk.directory, whole=whole)
                if error is not None:
                    self._desk.answer(ticket, Refused(error))
        self._started = bool(self._early) or not waiting
        return self._started

    def _pass_time(self) -> None:
        if self._ledger.ended is None:
            self._ledger.tick()
            if self._ledger.leading:
                self._saves.tick()
                self._restores.tick()
                self._stops.tick()
                self._keeping.tick()
                self._ending.tick()
            idle_at = self._idle_at()
            if idle_at is not None and idle_at <= self._desk.mono:
                error = CoordinatorUnavailableError(f"{self._desk.directory}: the coordinator was idle and has stopped")
                self._exit("idle", error)
        else:
            self._exit(f"{type(self._ledger.ended).__name__}: {self._ledger.ended}", self._ledger.ended)

    def _exit(self, reason: str, error: DistckptError) -> None:
        self._end = error
        self._desk.answer_everyone(Refused(error))
        self._desk.emit(Exit(reason))

    def _after_the_end(self, event: Event, error: DistckptError) -> None:
        if isinstance(event, Asked):
            self._desk.answer(event.ticket, Refused(error))

    def _idle_at(self) -> float | None:
        """When it will have been idle for too long; None while there is work."""
        parts = (self._ledger, self._library, self._restores, self._keeping, self._publishing, self._ending)
        if self._idle_timeout is None or not self._ledger.leading:
            return None
        if self._book or self._early or any(part.busy for part in parts):
            return None
        run = self._runs.current
        soon = run is not None and run.deserted and not self._keeping.owes
        return self._heard + (min(DESERTED_SECONDS, self._idle_timeout) if soon else self._idle_timeout)

    # ---- requests --------------------------------------------------------------------------------------------------

    def _serve(self, ticket: int, request: Request) -> None:
        self._heard = self._desk.mono
        if not self._ledger.leading:
            if isinstance(request, FromRank):  # its run is not known here before it was opened, and that may be refused
                self._desk.answer(ticket, Unknown())
            else:
                self._desk.hold(ticket, self._early, request)
            return
        match request:
            case OpenRun():
                self._open(ticket, request)
            case Pin(number, pinned):
                self._desk.hold(ticket, self._pinning, None)
                self._ledger.intend(SetPin(ticket, number, self._name, pinned))
            case Status():
                waiting = {**self._restores.waiting(), **self._saves.waiting()}
                self._desk.answer(ticket, status(self._ledger.entry, waiting))
            case FromRank():
                self._serve_rank(ticket, request)

    def _serve_rank(self, ticket: int, envelope: FromRank, looked: bool = False) -> None:
        rank, request = envelope.rank, envelope.request
        run = self._runs.current
        refusal = self._runs.refusal(envelope.run, rank)
        may_look = isinstance(refusal, Unknown | None) and not looked
        if may_look and self._lookups.hold(ticket, envelope, lambda: self._serve_rank(ticket, envelope, looked=True)):
            return
        if refusal is not None or run is None:
            self._turn_away(ticket, request, refusal)
            return
        self._stops.alive(rank)
        if not isinstance(request, Leave | AwaitStop | Heartbeat):  # these may come late, after the rank has left
            run.left.discard(rank)
        match request:
            case Join():
                self._saves.join(ticket, rank, request)
            case Describe():
                self._saves.describe(ticket, rank, request)
            case AwaitPlan():
                self._saves.await_plan(ticket, rank, request)
            case Receipt():
                self._saves.receipt(ticket, rank, request)
            case Fail():
                self._saves.fail(ticket, rank, request)
            case MakeRoom():
                self._keeping.make_room(ticket)
            case Restore():
                self._restores.restore(ticket, rank, request)
            case AwaitStop():
                self._stops.await_stop(ticket, rank, request)
            case Heartbeat():
                self._restores.alive(rank)
                self._desk.answer(ticket, Accepted())
            case AwaitPublished():
                self._publishing.await_published(ticket)
            case Leave(final):
                self._leave(ticket, rank, run, final)

    def _turn_away(self, ticket: int, request: RankRequest, refusal: Reply | None) -> None:
        """What was committed is committed, also for a rank that has not reported again after a restart."""
        record = None
        if isinstance(refusal, Unknown) and isinstance(request, Join | Receipt):
            record = self._ledger.state.find(request.attempt)
        self._desk.answer(ticket, Committed(record) if record is not None else refusal or Unknown())

    def _leave(self, ticket: int, rank: int, run: Run, final: bool) -> None:
        run.left.add(rank)
        self._stops.leave(rank)
        if final:
            self._ending.finish(ticket, rank)
        else:
            self._desk.answer(ticket, Accepted())
            self._ending.leave(rank)
        if run.deserted:
            self._saves.everyone_left()

    def _open(self, ticket: int, request: OpenRun) -> None:
        known = self._runs.current
        self._runs.open(ticket, request)
        if self._runs.current is not known:
            self._run_known()

    @property
    def _name(self) -> str:
        return self._runs.current.name if self._runs.current is not None else DEFAULT_NAME

    # ---- what an entry of the log leads to -------------------------------------------------------------------------

    def _follow_up(self, intention: Intention | Confirm, entry: Entry | None) -> None:
        """The entry of an intention counts, or (None) there was nothing left to change."""
        if isinstance(intention, SetPin) and intention.ticket in self._pinning:  # whoever asked may wait no longer
            self._desk.answer(intention.ticket, self._lookups.pinned(intention.number, intention.name))
        elif isinstance(intention, Confirm):
            self._restores.confirmed(intention.asked)
        elif isinstance(intention, End):
            self._ending.over()
        if entry is None:
            return
        match intention:
            case Claim():
                self._lead(entry)
            case BeginRun():
                self._run_begun(intention, entry)
            case Commit(record):
                self._saves.committed(entry.state.find(record.attempt) or record)
                self._publishing.publish(entry)
            case Retire():
                self._publishing.publish(entry)
                self._keeping.look()
            case Discard():
                self._keeping.look()
            case Reprieve():
                self._publishing.publish(entry)
            case SetPin(pinned=False):
                self._keeping.look()
            case SetPin() | Forget() | End() | Confirm():
                pass

    def _give_up(self, intention: Intention, reason: str) -> None:
        """No reader would take the entry of an intention, so there is none, and whoever has asked for it is told."""
        match intention:
            case BeginRun():
                self._runs.refused(intention, reason)
            case Commit(record):
                self._saves.commit_refused(record, reason)
            case SetPin(ticket):
                if ticket in self._pinning:
                    self._desk.answer(ticket, Refused(CoordinatorError(f"{self._desk.directory}: {reason}")))
            case End():
                self._ending.abandon(CoordinatorError(f"{self._desk.directory}: {reason}"))
            case Claim() | Discard() | Retire() | Forget() | Reprieve():
                pass

    def _lead(self, entry: Entry) -> None:
        self._publishing.publish(entry)
        if entry.state.retiring:
            self._keeping.look()
        early, self._early = self._early, {}
        for ticket, request in list(early.items()):
            self._desk.forget(ticket)
            self._serve(ticket, request)

    def _run_begun(self, begin: BeginRun, entry: Entry) -> None:
        error = self._runs.superseded(entry)
        self._saves.abandon(error)
        self._restores.abandon(error)
        self._stops.abandon(error)
        self._ending.abandon(error)
        self._runs.begun(begin, entry)
        self._run_known()

    def _run_known(self) -> None:
        if self._runs.current is not None:
            self._saves.begin_run(self._runs.current)
            self._keeping.collect()
