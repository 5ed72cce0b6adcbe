"""The machine's hands: it performs actions on a store and feeds what came of them back in. One per directory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import cast

from distckpt.coordinator.machine.actions import (
    Action,
    Answer,
    Append,
    AppendUnknown,
    Asked,
    CollectGarbage,
    Delete,
    Deleted,
    DeleteReports,
    Event,
    Exit,
    Forgotten,
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
    RoomMade,
    Seal,
    SkipsTold,
    StepFailed,
    TellSkips,
    Tick,
    WritePage,
)
from distckpt.coordinator.machine.machine import Machine
from distckpt.coordinator.messages import Refused, Reply, Request
from distckpt.coordinator.shell.appending import append_entry
from distckpt.coordinator.shell.housekeeping import (
    collect_garbage,
    collect_unclaimed,
    delete_checkpoints,
    probe_with_room,
)
from distckpt.coordinator.shell.needs import Needs, delete_reports, tell_skips
from distckpt.coordinator.shell.sealing import read_log_tail, seal_checkpoint
from distckpt.coordinator.shell.workers import Made, Workers
from distckpt.directory.garbage import GARBAGE_SECONDS, Watch
from distckpt.directory.locate import foreign_advice
from distckpt.directory.log import prune, read_tail, sequence_numbers
from distckpt.directory.pages import PageCache, known, write_page
from distckpt.directory.published import PublishedState
from distckpt.errors import (
    BlockedError,
    CheckpointNotFoundError,
    CoordinatorError,
    CoordinatorFailedError,
    DistckptError,
    SaveError,
    StorageError,
    StorageFullError,
)
from distckpt.format import names
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.sharding.plan import ShardingPlan, make_plan
from distckpt.storage import Store

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
"""How long closing waits for a store that does not answer. What is left undone then is done by the next coordinator."""

END_SECONDS = 5.0
"""How long closing waits for threads that have nothing left to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a coordinator behaves: for how many seconds it watches what may be garbage, and until when an idle one exits."""

    garbage_age: float = GARBAGE_SECONDS
    idle_timeout: float | None = None


@dataclass(slots=True, eq=False)
class _Life:
    """One machine, who waits for its answers, and what is being done for it; until it fails, when it is ``over``."""

    machine: Machine
    tickets: dict[int, Future[Reply]] = field(default_factory=dict)
    doing: dict[int, Action] = field(default_factory=dict)
    over: bool = False


class Shell:
    """Runs one machine on one store. Thread-safe. Events are handled one at a time; effects run in the background.

    An exception that comes out of the machine leaves it in no state to go on from. Everyone who waits for it is refused
    with that, and with the next request another machine begins from the log, as after a restart of the process.

    ``on_exit`` is called when the machine has come to its end, with the reason; ``on_entry`` with the newest number of the
    log, as soon as an entry is there: it returns at once and raises nothing.

    Wall-clock time is read through ``time.time`` alone, deadlines through ``time.monotonic``.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        on_exit: Callable[[str], None] | None = None,
        on_entry: Callable[[int], None] | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._on_exit = on_exit
        self._on_entry = on_entry
        self._life = self._new_life()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._sealer = EntrySealer()  # used in the log's thread alone
        self._state_file = PublishedState(store)
        self._pages = PageCache(store)
        self._watch = Watch(store)
        self._needs = Needs(store)  # the machine reads them once at a time
        self._numbers = itertools.count()
        self._garbage: CollectGarbage | None = None
        self._closed = False
        # One thread each, so that appends, and later the things derived from them, happen in the order of the log.
        self._log_worker = Workers("distckpt-log", 1)
        self._keep_worker = Workers("distckpt-keep", 1)
        self._workers = Workers("distckpt-work", 3)
        self._garbage_worker = Workers("distckpt-garbage", 1)
        self._timer = threading.Thread(target=self._run_timer, name="distckpt-timer", daemon=True)

    def start(self) -> None:
        """Check that the store can keep our promises. StoreUnsuitableError or StorageError if it cannot.

        The directory is claimed when the first request comes.
        """
        probe_with_room(self._store, self._watch, self._settings.garbage_age)
        self._timer.start()

    def submit(self, request: Request) -> Future[Reply]:
        """Hand a request to the machine. Cancel the future when nobody waits for the answer any more."""
        future: Future[Reply] = Future()
        with self._lock:
            if self._closed:
                future.set_result(Refused(self._closed_error()))
                return future
            if self._life.over:
                self._life = self._new_life()
            life, ticket = self._life, next(self._numbers)
            life.tickets[ticket] = future
        self._handle(life, Asked(ticket, request))
        future.add_done_callback(lambda done: self._forget(life, ticket) if done.cancelled() else None)
        return future

    def close(self) -> None:
        """Finish what is being done on storage, retention included, and stop. Later requests are refused.

        Whatever the store does, it returns after a little more than ``CLOSE_SECONDS``. What is left undone then is
        logged; who still waits for an answer is refused.
        """
        with self._lock:
            life = self._life
            self._changed.wait_for(lambda: life.over or not life.doing, CLOSE_SECONDS)
            left = () if life.over else tuple(life.doing.values())
            self._closed = True
            self._changed.notify_all()
        self._refuse(life, self._closed_error())
        pools = (self._workers, self._log_worker, self._keep_worker, self._garbage_worker)
        for pool in pools:
            pool.stop()
        if left:
            logger.error(
                "%s: closing has waited %g s for the store and waits no longer. Left undone, until the next manager: %s",
                self._store.url,
                CLOSE_SECONDS,
                ", ".join(type(action).__name__ for action in left),
            )
            return
        deadline = time.monotonic() + END_SECONDS
        for pool in pools:
            pool.join(deadline)
        if self._timer.is_alive() and self._timer is not threading.current_thread():
            self._timer.join(max(0.0, deadline - time.monotonic()))

    # ---- events and answers ----------------------------------------------------------------------------------------

    def _new_life(self) -> _Life:
        return _Life(Machine(self._store.url, uuid.uuid4().hex, idle_timeout=self._settings.idle_timeout))

    def _closed_error(self) -> CoordinatorError:
        return CoordinatorError(f"{self._store.url}: the coordinator has been closed")

    def _forget(self, life: _Life, ticket: int) -> None:
        life.tickets.pop(ticket, None)
        self._handle(life, Forgotten(ticket))

    def _handle(self, life: _Life, event: Event) -> None:
        """Step the machine. Whatever is raised on the way to its last answer ends its life."""
        try:
            answers = []
            with self._lock:
                if life.over:
                    return
                for action in life.machine.step(event, time.time(), time.monotonic()):
                    if isinstance(action, Answer):
                        answers.append(action)
                    else:
                        self._dispatch(life, action)
                self._changed.notify_all()
            for answer in answers:
                self._answer(life, answer)
        except BaseException as error:
            self._fail(life, error)
            if not isinstance(error, Exception):
                raise  # Ctrl-C, in the thread of somebody who asks

    def _answer(self, life: _Life, answer: Answer) -> None:
        error = answer.reply.error if isinstance(answer.reply, Refused) else None
        if isinstance(error, CheckpointNotFoundError) and not self._closed:
            # Storage is looked at in the background: whoever asks may be an event loop.
            self._workers.put(lambda: self._settle(life, answer.ticket, Refused(self._advised(error))))
        else:
            self._settle(life, answer.ticket, answer.reply)

    def _settle(self, life: _Life, ticket: int, reply: Reply) -> None:
        future = life.tickets.get(ticket)
        if future is not None:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more, or it has been refused meanwhile
                future.set_result(reply)
        life.tickets.pop(ticket, None)

    def _advised(self, error: CheckpointNotFoundError) -> CheckpointNotFoundError:
        """The same error, with what to do if such a checkpoint lies there without being in the log."""
        try:
            state = read_tail(self._store).head
            advice = foreign_advice(self._store, error.path.rpartition("/")[2], known(self._store, state))
            return CheckpointNotFoundError(error.path, f"{error.message}{advice}") if advice else error
        except Exception as problem:  # noqa: BLE001 - somebody waits for the answer, which this only adds to
            logger.warning("looking for %s, which the log does not know, failed: %s", error.path, problem)
            return error

    def _run_timer(self) -> None:
        while not self._closed:
            try:
                self._tick_in_time()
            except BaseException as error:  # noqa: BLE001 - a timer that ended would let everyone wait for ever
                self._fail(self._life, error)

    def _tick_in_time(self) -> None:
        """Give the machine its tick if it is time; else wait until it may be."""
        with self._lock:
            life = self._life
            deadline = None if life.over or self._closed else life.machine.next_deadline()
            wait = None if deadline is None else deadline - time.monotonic()
            if (wait is None or wait > 0) and not self._closed:
                self._changed.wait(wait)
                return
        self._handle(life, Tick())

    # ---- when it goes wrong ----------------------------------------------------------------------------------------

    def _fail(self, life: _Life, error: BaseException) -> None:
        """The machine is of no use any more: ``error`` came out of it, or out of what carries its actions and answers."""
        if not life.over:
            reason = f"{type(error).__name__}: {error}"
            known = CoordinatorFailedError(self._store.url, reason)
            try:
                logger.error("%s", known, exc_info=error)
            finally:
                self._end(life, known)

    def _end(self, life: _Life, error: DistckptError) -> None:
        """No more comes of this machine. Tell everyone who waits; another one begins when somebody asks again."""
        with self._lock:
            life.over = True
            self._changed.notify_all()
        self._refuse(life, error)

    def _refuse(self, life: _Life, error: DistckptError) -> None:
        for ticket in list(life.tickets):
            self._settle(life, ticket, Refused(error))

    # ---- actions ---------------------------------------------------------------------------------------------------

    def _dispatch(self, life: _Life, action: Action) -> None:
        if self._closed:
            return
        if isinstance(action, Append | ReadTail | ReadNewest | WritePage):
            workers = self._log_worker
        elif isinstance(
            action, MakePlan | Seal | ReadLeases | ReadPages
        ):  # a commit waits for leases, but for no deletion
            workers = self._workers
        elif isinstance(action, CollectGarbage):  # it may take long, and nothing waits for it
            workers = self._garbage_worker
        else:
            workers = self._keep_worker
        number = next(self._numbers)
        life.doing[number] = action
        workers.put(functools.partial(self._perform, life, number, action))

    def _perform(self, life: _Life, number: int, action: Action) -> None:
        try:
            if life.over:  # another machine may have begun; what this one has wanted is not to be begun any more
                return
            event = self._event_of(life, action)
            if event is not None:
                self._handle(life, event)
            with self._lock:
                life.doing.pop(number, None)
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the machine would wait for ever for what comes of it
            self._fail(life, error)

    def _event_of(self, life: _Life, action: Action) -> Event | None:
        try:
            return self._effect(action)
        except Exception as error:  # noqa: BLE001 - whatever an effect raises must reach the machine, or it waits for ever
            return self._failed(life, action, error)

    def _effect(self, action: Action) -> Event | None:
        match action:
            case ReadTail():
                return read_log_tail(self._store)
            case Append():
                return self._with_room(lambda: append_entry(self._store, action.entry, self._sealer, self._on_entry))
            case ReadNewest():
                return NewestRead(max(sequence_numbers(self._store), default=0))
            case ReadPages():
                found, failed = self._pages.read(action.pages)
                return PagesRead(action.asked, found, failed)
            case WritePage():
                ref = self._with_room(lambda: write_page(self._store, action.page, action.of, action.records))
                return PageWritten(action.page, ref)
            case MakePlan():
                plan = make_plan(action.number, action.descriptions, action.staged, action.fresh)
                return PlanMade(action.attempt, plan)
            case Seal():
                table = cast(ShardingPlan, action.plan).table
                return self._with_room(lambda: seal_checkpoint(self._store, action, table))
            case ReadLeases():
                return self._needs.read(action)
            case TellSkips():
                return tell_skips(self._store, action)
            case Delete(records, reports):
                return delete_checkpoints(self._store, records, reports)
            case DeleteReports(reports):
                delete_reports(self._store, reports)
            case CollectGarbage():
                self._garbage = action
                collect_garbage(self._store, action, self._settings.garbage_age, self._watch)
                return RoomMade() if action.urgent else None
            case Publish():
                if action.entry.state.active:
                    self._state_file.publish(action.entry.state)
                prune(self._store, action.entry.seq)
                return Published(action.entry)
            case Exit():
                if self._on_exit is not None:
                    self._on_exit(action.reason)
        return None

    def _with_room(self, write: Callable[[], Made]) -> Made:
        """What ``write`` returns; if the store is full, once more after dead attempts have been deleted.

        The garbage that the machine asked for last is garbage for ever, so it need not be asked again.
        """
        try:
            return write()
        except StorageFullError as error:
            logger.warning("%s; it is tried again once garbage has been deleted", error)
            if self._garbage is not None:
                urgent = replace(self._garbage, urgent=True)
                collect_garbage(self._store, urgent, self._settings.garbage_age, self._watch)
            elif not collect_unclaimed(self._store, self._settings.garbage_age, self._watch):
                raise
            return write()

    def _failed(self, life: _Life, action: Action, error: Exception) -> Event | None:
        if isinstance(action, MakePlan | Seal):
            if not isinstance(error, DistckptError):
                logger.error("unexpected error in the coordinator", exc_info=error)
            known = error if isinstance(error, SaveError) else SaveError(action.number, f"{error}")
            return StepFailed(action.attempt, known)
        if isinstance(action, Append):
            blocked = error if isinstance(error, BlockedError) else None
            return AppendUnknown(action.entry, f"{type(error).__name__}: {error}", blocked)
        if isinstance(action, ReadNewest):
            return NewestRead(None, f"{type(error).__name__}: {error}")
        if isinstance(action, ReadPages):
            known_error = error if isinstance(error, DistckptError) else StorageError(names.PAGES, f"{error}")
            return PagesRead(action.asked, {}, {page.id: known_error for page in action.pages})
        if isinstance(action, WritePage):
            logger.warning("a page of the log was not written, which is tried again: %s", error)
            return PageWritten(action.page, None)
        if isinstance(action, ReadLeases):
            return LeasesRead(frozenset(), f"{error}")
        if isinstance(action, TellSkips):
            return SkipsTold(done=False)
        if isinstance(action, Delete):
            logger.warning("deleting failed and will be tried again: %s", error)
            return Deleted(())
        if isinstance(action, ReadTail):
            self._refuse_all(life, error)
            return None
        if isinstance(action, CollectGarbage) and action.urgent:
            logger.warning("no room could be made in %s: %s", self._store.url, error)
            return RoomMade()
        # Publish and garbage are derived or optional: nothing depends on them, and the next commit does them again.
        logger.warning("%s in %s failed: %s", type(action).__name__, self._store.url, error)
        return Published(action.entry) if isinstance(action, Publish) else None

    def _refuse_all(self, life: _Life, error: Exception) -> None:
        """Without the log nothing can be served: tell everyone who waits, and read it again when asked again."""
        logger.error("%s cannot be served: %s", self._store.url, error)
        self._end(life, error if isinstance(error, DistckptError) else CoordinatorError(f"{self._store.url}: {error}"))
