"""The coordinator of a directory inside the process of DCP's coordinator rank, which speaks for all ranks of a save.

DCP gathers what its ranks say, so nobody has to be found: what the ranks of a manager would each tell a Ray actor is told
here at once, and the same machine decides. A directory has one session in a process, whichever writers are made: it
claims the log with its first save, and is one run from then on. So whoever claims the log later turns it away for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import numpy as np

from distckpt.coordinator.client.client import OPEN_SECONDS, raised
from distckpt.coordinator.messages import (
    AwaitPublished,
    Committed,
    Describe,
    FromRank,
    Join,
    Joined,
    Lag,
    Late,
    Leave,
    OpenRun,
    RankRequest,
    Receipt,
    Reply,
    Request,
    RunOpened,
    Unknown,
    kind_of,
)
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.directory.newest import committed_after_all, newest_committed
from distckpt.errors import CommitUnknownError, CoordinatorUnavailableError, DistckptError, SaveError
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention
from distckpt.rank.exit import close_at_exit
from distckpt.storage import Store, mark_of
from distckpt.world import new_token

logger = logging.getLogger(__name__)

ROUND_SECONDS = 86400.0
"""Until when a save is over at the latest. DCP itself finds out who does not come; a next save ends one that it gave up."""

PUBLISH_SECONDS = 10.0
LEAVE_SECONDS = 5.0
EXIT_LOOK_SECONDS = 0.1

MOST_SESSIONS = 4
"""In so many directories a process is the coordinator at once; the one that it has used least lately is left."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has written of an attempt: ``rows`` of its ``description``, all of which are in its ``shards``."""

    digest: str
    description: bytes
    rows: int
    shards: tuple[ShardReceipt, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What the ranks of a run agree on. ``world_size`` of them save as ``name``."""

    name: str
    world_size: int
    retention: Retention


class Session:
    """One run of DCP's ranks in the directory of ``store``. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._terms: Terms | None = None
        self._token = ""
        self._opened: RunOpened | None = None
        self._order = 0
        self.in_flight = False
        """Whether a save has begun and has not come to its end here, which it never does if DCP gives it up."""
        self._shell = Shell(store, Settings())
        try:
            self._shell.start()
        except BaseException:
            self._shell.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it has claimed the log."""
        return self._opened is not None

    def begin(self, number: int | None, terms: Terms, hosts: Sequence[str], patience: float) -> tuple[int, str]:
        """A number (the next one, where None is given) and a new attempt for it. What was begun before and has not come
        to its end is given up by that.

        Raises what a manager's save raises: FencedError and StaleRunError where somebody has claimed the log since.
        """
        with self._lock:
            self._open(terms, hosts, patience)
            if number is None:
                newest = newest_committed(self._store)
                number = newest.number + 1 if newest is not None else 1
            self._order += 1
            join = Join(self._order, number, "", staged=True)
            replies = self._ask([join] * terms.world_size, patience)
            if any(
                isinstance(reply, Unknown) for reply in replies
            ):  # the coordinator has failed, and is another one now
                self._reopen(terms, hosts, patience)
                replies = self._ask([join] * terms.world_size, patience)
            joined = next(iter(replies), None)
            if not isinstance(joined, Joined):
                raise SaveError(number, f"unexpected answer to Join: {joined!r}")
            self.in_flight = True
            return number, joined.attempt

    def commit(self, number: int, attempt: str, parts: Sequence[Part], patience: float) -> CheckpointRecord:
        """Seal what the ranks have written, in their order, and enter it into the log; it counts on return.

        Raises PlanError for parts that do not add up to whole tensors, NotSharedError for shards that are not to be seen
        from here, and all else that a manager's save raises; nothing is committed then, but for CommitUnknownError.
        """
        try:
            return self._commit(number, attempt, parts, patience)
        finally:
            self.in_flight = False

    def _commit(self, number: int, attempt: str, parts: Sequence[Part], patience: float) -> CheckpointRecord:
        if self._opened is None:
            raise SaveError(number, "the program ends, and its run was left. Nothing was committed")
        requests: list[RankRequest] = []
        for part in parts:
            staged = np.arange(part.rows, dtype="<i4").tobytes()
            requests.append(Describe(attempt, part.digest, part.description, staged))
        try:
            self._ask(requests, patience)
            replies = self._ask([Receipt(attempt, part.shards) for part in parts], patience)
        except CoordinatorUnavailableError as error:
            record = committed_after_all(self._store, attempt)
            if record is None:
                reason = f"the store does not say whether its log entry was written: {error}"
                raise CommitUnknownError(number, reason) from error
            return record
        committed = replies[0]
        if not isinstance(committed, Committed):
            raise SaveError(
                number, "the coordinator started again meanwhile. Nothing was committed; the next save starts afresh"
            )
        self._publish()
        return committed.record

    def close(self) -> None:
        """Leave the run once what is being done on storage is done, retention included."""
        if self._opened is not None and self._terms is not None:
            with contextlib.suppress(DistckptError):
                self._ask([Leave()] * self._terms.world_size, LEAVE_SECONDS)
        self._shell.close()

    # ---- what is asked -------------------------------------------------------------------------------------------

    def _open(self, terms: Terms, hosts: Sequence[str], patience: float) -> None:
        """Have a run with these terms: the one that there is, or a new one."""
        if self._opened is None or self._terms != terms:
            token = new_token()
            self._opened = self._ask_to_open(token, terms, hosts, patience)
            self._token, self._terms, self._order = token, terms, 0

    def _reopen(self, terms: Terms, hosts: Sequence[str], patience: float) -> None:
        assert self._opened is not None
        self._opened = self._ask_to_open(self._token, terms, hosts, patience, self._opened)

    def _ask_to_open(
        self, token: str, terms: Terms, hosts: Sequence[str], patience: float, before: RunOpened | None = None
    ) -> RunOpened:
        run, origin = (before.run, before.origin) if before is not None else (0, "")
        size, retention = terms.world_size, terms.retention
        requests = [
            OpenRun(token, rank, size, host, terms.name, retention, ROUND_SECONDS, run, origin)
            for rank, host in enumerate(hosts)
        ]
        opened = self._submit(requests, max(OPEN_SECONDS, patience))[0]
        if not isinstance(opened, RunOpened):
            raise CoordinatorUnavailableError(f"unexpected answer to OpenRun: {opened!r}")
        return opened

    def _ask(self, requests: Sequence[RankRequest], patience: float) -> list[Reply]:
        """The answers to what each rank asks."""
        assert self._opened is not None
        run = self._opened.run
        return self._submit([FromRank(run, rank, request) for rank, request in enumerate(requests)], patience)

    def _submit(self, requests: Sequence[Request], patience: float) -> list[Reply]:
        until = time.monotonic() + patience
        futures = [self._shell.submit(request) for request in requests]
        replies: list[Reply] = []
        try:
            for at, request in enumerate(requests):
                while True:
                    try:
                        reply = raised(futures[at].result(max(0.0, until - time.monotonic())))
                    except FutureTimeoutError:
                        what = kind_of(request)
                        raise CoordinatorUnavailableError(
                            f"{self._store.url}: no answer to {what} within {patience:g} s: the store may be slow or "
                            "unreachable"
                        ) from None
                    if not isinstance(reply, Late | Lag):
                        break
                    if isinstance(reply, Lag):  # it takes as long as it takes
                        until = time.monotonic() + patience
                        logger.warning("%s: the save waits for the group %r of readers", self._store.url, reply.group)
                    futures[at] = self._shell.submit(request)
                replies.append(reply)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return replies

    def _publish(self) -> None:
        """Have the ``checkpoint`` file say what was committed, which is derived."""
        try:
            self._ask([AwaitPublished()], PUBLISH_SECONDS)
        except DistckptError as error:
            logger.warning("the `checkpoint` file may lag behind what was committed: %s", error)


class Flight:
    """A save of DCP's in this process, in whichever thread. The end of the program waits for it."""

    def __init__(self, patience: float) -> None:
        self._thread = threading.current_thread()
        self._patience = patience
        self._ended = threading.Event()
        with _lock:
            _flights[self._thread] = self  # in place of one that DCP has given up
        close_at_exit(_ending)

    def end(self) -> None:
        """This rank has done its part."""
        self._ended.set()
        with _lock:
            if _flights.get(self._thread) is self:
                del _flights[self._thread]

    def wait(self) -> None:
        """Return once that is so, or the thread has ended, as when DCP gives a save up: the one that calls this has."""
        if self._thread is threading.current_thread():
            return
        until = time.monotonic() + self._patience
        while self._thread.is_alive() and time.monotonic() < until and not self._ended.wait(EXIT_LOOK_SECONDS):
            pass


class _Ending:
    """What this process does with saves and sessions when its program ends."""

    def close(self) -> None:
        """Let saves in flight come to their end, which ``dcp.async_save`` does in a thread, then leave all runs."""
        for flight in list(_flights.values()):
            flight.wait()
        with _lock:
            sessions = [session for (pid, *_), session in _sessions.items() if pid == os.getpid()]
            _sessions.clear()
        for session in sessions:
            session.close()


def session_of(store: Store) -> Session:
    """The session of this process in the directory of ``store``. Raises StorageError or StoreUnsuitableError."""
    with _lock:
        key = _key(store)
        session = _sessions.pop(key, None) or Session(store)
        _sessions[key] = session
        idle = [other for other, one in _sessions.items() if not one.in_flight and other != key]
        for other in idle[: max(0, len(_sessions) - MOST_SESSIONS)]:
            left = _sessions.pop(other)
            if other[0] == os.getpid():
                left.close()
        return session


def forget(store: Store) -> None:
    """Let a session go that has not come to claim the log: the next save tries it again."""
    with _lock:
        session = _sessions.get(_key(store))
        if session is not None and not session.is_open:
            del _sessions[_key(store)]
            session.close()


def _key(store: Store) -> tuple[int, str, str]:
    return os.getpid(), store.url, mark_of(store)  # a forked child has none of the threads


_lock = threading.Lock()
_sessions: dict[tuple[int, str, str], Session] = {}
_flights: dict[threading.Thread, Flight] = {}
_ending = _Ending()
