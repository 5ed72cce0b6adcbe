"""The machine's hands: it performs actions on a store and feeds what came of them back in. One per directory."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

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
    Forgotten,
    LeasesRead,
    MakePlan,
    NameTaken,
    PlanMade,
    Publish,
    Published,
    ReadLeases,
    ReadTail,
    Seal,
    StepFailed,
    Tick,
)
from distckpt.coordinator.machine.machine import Machine
from distckpt.coordinator.messages import Refused, Reply, Request
from distckpt.coordinator.shell.housekeeping import Predecessors, collect_garbage, delete_checkpoints
from distckpt.coordinator.shell.leases import Leases
from distckpt.coordinator.shell.sealing import read_log_tail, seal_checkpoint
from distckpt.directory.locate import foreign_advice
from distckpt.directory.log import append, prune, read_tail
from distckpt.directory.published import PublishedState
from distckpt.errors import BlockedError, CheckpointNotFoundError, CoordinatorError, DistckptError, SaveError
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import Entry
from distckpt.sharding.plan import ShardingPlan, make_plan
from distckpt.storage import Store, probe

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
"""How long closing waits for a store that does not answer. What is left undone then is done by the next coordinator."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a coordinator behaves: seconds until an unfinished attempt is garbage, and until an idle one exits."""

    garbage_age: float = 3600.0
    idle_timeout: float | None = None


class Shell:
    """Runs one machine on one store. Thread-safe. Events are handled one at a time; effects run in the background.

    Wall-clock time is read through ``time.time`` alone, deadlines through ``time.monotonic``.
    """

    def __init__(self, store: Store, settings: Settings, on_exit: Callable[[str], None] | None = None) -> None:
        self._store = store
        self._settings = settings
        self._on_exit = on_exit
        self._machine = Machine(store.url, uuid.uuid4().hex, idle_timeout=settings.idle_timeout)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._tickets: dict[int, Future[Reply]] = {}
        self._next_ticket = 0
        self._sealer = EntrySealer()  # used in the log's thread alone
        self._state_file = PublishedState(store)
        self._predecessors = Predecessors(store)
        self._leases = Leases(store)  # the machine reads them once at a time
        self._closed = False
        self._in_flight = 0
        # One thread each, so that appends, and later the things derived from them, happen in the order of the log.
        self._log_pool = ThreadPoolExecutor(1, "distckpt-log")
        self._keep_pool = ThreadPoolExecutor(1, "distckpt-keep")
        self._work_pool = ThreadPoolExecutor(3, "distckpt-work")
        self._garbage_pool = ThreadPoolExecutor(1, "distckpt-garbage")
        self._timer = threading.Thread(target=self._run_timer, name="distckpt-timer", daemon=True)

    def start(self) -> None:
        """Check that the store can keep our promises. StoreUnsuitableError or StorageError if it cannot.

        The directory is claimed when the first request comes.
        """
        probe(self._store)
        self._timer.start()

    def submit(self, request: Request) -> Future[Reply]:
        """Hand a request to the machine. Cancel the future when nobody waits for the answer any more."""
        future: Future[Reply] = Future()
        with self._lock:
            if self._closed:
                future.set_result(Refused(CoordinatorError(f"{self._store.url}: the coordinator has been closed")))
                return future
            ticket = self._next_ticket
            self._next_ticket += 1
            self._tickets[ticket] = future
        self._handle(Asked(ticket, request))
        future.add_done_callback(lambda done: self._forget(ticket) if done.cancelled() else None)
        return future

    def close(self) -> None:
        """Finish what is being done on storage, retention included, and stop. Later requests are refused."""
        with self._lock:
            self._changed.wait_for(lambda: self._in_flight == 0, CLOSE_SECONDS)
            self._closed = True
            self._changed.notify_all()
        if self._timer.is_alive() and self._timer is not threading.current_thread():
            self._timer.join()
        for pool in (self._work_pool, self._log_pool, self._keep_pool, self._garbage_pool):
            pool.shutdown(wait=True)

    def _forget(self, ticket: int) -> None:
        with self._lock:
            self._tickets.pop(ticket, None)
        self._handle(Forgotten(ticket))

    def _handle(self, event: Event) -> None:
        answers = []
        with self._lock:
            for action in self._machine.step(event, time.time(), time.monotonic()):
                if isinstance(action, Answer):
                    answers.append((self._tickets.pop(action.ticket, None), action.reply))
                else:
                    self._dispatch(action)
            self._changed.notify_all()
        for future, reply in answers:
            if future is not None and future.set_running_or_notify_cancel():
                self._answer(future, reply)

    def _answer(self, future: Future[Reply], reply: Reply) -> None:
        error = reply.error if isinstance(reply, Refused) else None
        if isinstance(error, CheckpointNotFoundError):
            with self._lock:
                if not self._closed:  # storage is looked at in the background: whoever asks may be an event loop
                    self._work_pool.submit(lambda: future.set_result(Refused(self._advised(error))))
                    return
        future.set_result(reply)

    def _advised(self, error: CheckpointNotFoundError) -> CheckpointNotFoundError:
        """The same error, with what to do if such a checkpoint lies there without being in the log."""
        try:
            known = read_tail(self._store).state.known()
            advice = foreign_advice(self._store, error.path.rpartition("/")[2], known)
        except Exception as problem:  # noqa: BLE001 - somebody waits for the answer, which this only adds to
            logger.warning("looking for %s, which the log does not know, failed: %s", error.path, problem)
            advice = ""
        return CheckpointNotFoundError(error.path, f"{error.message}{advice}") if advice else error

    def _dispatch(self, action: Action) -> None:
        if self._closed:
            return
        if isinstance(action, Append | ReadTail):
            pool = self._log_pool
        elif isinstance(action, MakePlan | Seal | ReadLeases):  # a commit waits for leases, but for no deletion
            pool = self._work_pool
        elif isinstance(action, CollectGarbage):  # it may take long, and nothing waits for it
            pool = self._garbage_pool
        else:
            pool = self._keep_pool
        self._in_flight += 1
        pool.submit(self._perform, action)

    def _run_timer(self) -> None:
        with self._lock:
            while not self._closed:
                deadline = self._machine.next_deadline()
                late = deadline is not None and deadline <= time.monotonic()
                if late:
                    self._lock.release()
                    try:
                        self._handle(Tick())
                    finally:
                        self._lock.acquire()
                self._changed.wait(None if deadline is None else max(0.001, deadline - time.monotonic()))

    def _perform(self, action: Action) -> None:
        try:
            event = self._effect(action)
        except Exception as error:  # noqa: BLE001 - whatever an effect raises must reach the machine, or it waits for ever
            event = self._failed(action, error)
        if event is not None:
            self._handle(event)
        with self._lock:
            self._in_flight -= 1
            self._changed.notify_all()

    def _effect(self, action: Action) -> Event | None:
        match action:
            case ReadTail():
                return read_log_tail(self._store)
            case Append():
                return self._append(action)
            case MakePlan():
                plan = make_plan(action.number, action.descriptions, action.staged, action.fresh)
                return PlanMade(action.attempt, plan)
            case Seal():
                return seal_checkpoint(self._store, action, cast(ShardingPlan, action.plan).table)
            case ReadLeases():
                return self._leases.read()
            case Delete():
                return delete_checkpoints(self._store, action.records)
            case CollectGarbage():
                collect_garbage(self._store, action, self._settings.garbage_age, self._predecessors)
            case Publish():
                if action.entry.state.active:
                    self._state_file.publish(action.entry.state)
                prune(self._store, action.entry.seq)
                return Published(action.entry)
            case Exit():
                if self._on_exit is not None:
                    self._on_exit(action.reason)
        return None

    def _append(self, action: Append) -> Event:
        result = append(self._store, action.entry, self._sealer)
        if result.outcome == "appended":
            _warn_of_clock(self._store, action.entry)
            return Appended(action.entry, result.newest)
        if result.outcome == "taken":
            return NameTaken(action.entry, result.found, result.newest)
        if result.outcome == "refused":
            logger.error("%s: the entry %s is not written: %s", self._store.url, action.entry.kind, result.reason)
            return AppendRefused(action.entry, result.reason)
        return AppendUnknown(action.entry, result.reason)

    def _failed(self, action: Action, error: Exception) -> Event | None:
        if isinstance(action, MakePlan | Seal):
            if not isinstance(error, DistckptError):
                logger.error("unexpected error in the coordinator", exc_info=error)
            known = error if isinstance(error, SaveError) else SaveError(action.number, f"{error}")
            return StepFailed(action.attempt, known)
        if isinstance(action, Append):
            blocked = error if isinstance(error, BlockedError) else None
            return AppendUnknown(action.entry, f"{type(error).__name__}: {error}", blocked)
        if isinstance(action, ReadLeases):
            return LeasesRead(frozenset(), f"{error}")
        if isinstance(action, Delete):
            logger.warning("deleting failed and will be tried again: %s", error)
            return Deleted(())
        if isinstance(action, ReadTail):
            self._refuse_all(error)
            return None
        # Publish and garbage are derived or optional: nothing depends on them, and the next commit does them again.
        logger.warning("%s in %s failed: %s", type(action).__name__, self._store.url, error)
        return Published(action.entry) if isinstance(action, Publish) else None

    def _refuse_all(self, error: Exception) -> None:
        """Without the log nothing can be served: tell everyone who waits, and read it again when asked again."""
        logger.error("the log of %s cannot be read: %s", self._store.url, error)
        known = error if isinstance(error, DistckptError) else CoordinatorError(f"{self._store.url}: {error}")
        with self._lock:
            waiting, self._tickets = self._tickets, {}
            self._machine = Machine(self._store.url, uuid.uuid4().hex, idle_timeout=self._settings.idle_timeout)
        for future in waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_result(Refused(known))


def _warn_of_clock(store: Store, entry: Entry) -> None:
    behind = entry.state.last_preserved_timestamp - entry.time
    if entry.kind == "run" and behind > 0 and (entry.state.active or entry.state.preserved):
        logger.warning(
            "%s: time.time() is %.0f s behind the last preserved checkpoint: what is there stays for good",
            store.url,
            behind,
        )
