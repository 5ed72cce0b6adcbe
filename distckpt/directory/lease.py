"""A reader's lease on storage: while it is held, retention does not delete what is being read."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator

from distckpt.directory.log import read_tail
from distckpt.directory.stillness import elapsed
from distckpt.errors import CheckpointNotFoundError, LeaseLostError
from distckpt.format import names
from distckpt.format.json.lease import FORMAT, Lease
from distckpt.format.json.sealed import seal
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""How long a lease counts that is not renewed. It is, four times as often."""

TRIES = 3

TRUSTED = 0.9
"""The part of its duration for which a holder trusts a lease. Monotonic clocks may run apart by the rest, a tenth."""


class Term:
    """Until when a holder trusts its lease, by its own clock: once that has passed, never again. Pure."""

    def __init__(self, seconds: float, began: float) -> None:
        self._seconds = seconds
        self._end = began + TRUSTED * seconds
        self._has_ended = False

    @property
    def end(self) -> float:
        """When it ends, if it is not renewed."""
        return self._end

    def has_ended(self, now: float) -> bool:
        """Whether it is over."""
        self._has_ended = self._has_ended or now >= self._end
        return self._has_ended

    def renewed(self, began: float, now: float) -> None:
        """A renewal that ``began`` before it was written has been answered. One that comes too late renews nothing."""
        if not self.has_ended(now):
            self._end = began + TRUSTED * self._seconds


class HeldLease:
    """A lease that this process holds and renews, from ``take`` until ``release`` or until it is lost.

    Whoever wants to delete waits until it has not changed for its duration, counted from when he first saw it so: that is
    after we began to write it, which is from when we count. So it is lost here first. Safe to use from several threads.
    """

    def __init__(self, store: Store, attempt: str, holder: str, seconds: float, clock: Callable[[], float]) -> None:
        self.id = uuid.uuid4().hex
        self.attempt = attempt
        self._store = store
        self._holder = holder
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._beat = 0
        self._term = Term(seconds, clock())
        self._is_fresh = True
        self._renewing: Coordinator | None = None

    @staticmethod
    def take(
        store: Store,
        attempt: str,
        holder: str,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = elapsed,
    ) -> HeldLease:
        """Keep a committed checkpoint from being deleted. ``holder`` says who reads, for people.

        Raises CheckpointNotFoundError if the log does not list the attempt as active or preserved, StorageError if the
        lease cannot be written, LeaseLostError if all that took longer than it lasts, several times in a row, ValueError if
        it would last for more than a day.
        """
        for _ in range(TRIES - 1):
            try:
                return HeldLease._taken(store, attempt, holder, seconds, clock)
            except LeaseLostError as error:  # this process may have stood still
                logger.warning("a lease was lost before it was known to hold, and is taken again: %s", error)
        return HeldLease._taken(store, attempt, holder, seconds, clock)

    @staticmethod
    def _taken(store: Store, attempt: str, holder: str, seconds: float, clock: Callable[[], float]) -> HeldLease:
        held = HeldLease(store, attempt, holder, seconds, clock)
        try:
            held._write()
            held._keep_renewing()
            # In this order: retention first appends that it retires, then reads the leases. One of us sees the other.
            _check_alive(store, attempt)
            held.check()
        except BaseException:
            held.release()
            raise
        return held

    def check(self) -> None:
        """LeaseLostError, from then on for ever, if it could not be renewed in time by our own clock.

        Who has read something and then finds no error here has read what was there: call it before bytes are used.
        """
        if self._has_ended():
            raise LeaseLostError(self._store.url, self.attempt, self._seconds)

    def release(self) -> None:
        """Let go: it is renewed no more, and deleted. What cannot be deleted is warned of, and will expire. Twice is fine."""
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.request_stop()
            renewing.join(ignore_live_threads=True)
        try:
            self._store.delete(self._path)
        except Exception as error:  # noqa: BLE001 - what storage libraries raise untranslated may pass as well
            logger.warning("the lease %s was left behind and will expire: %s", self._path, error)

    @property
    def _path(self) -> str:
        return names.lease_path(self.id)

    def _write(self) -> None:
        lease = Lease(FORMAT, self.attempt, self._holder, self._seconds, self._beat)
        self._beat += 1  # whether or not it will be written: no two attempts at it may look alike
        self._store.replace(self._path, seal(lease))

    def _keep_renewing(self) -> None:
        self._renewing = coord = Coordinator()
        LooperThread.loop(coord, self._seconds / 4, self._renew, (coord,), name="distckpt-lease", skip_missed=True)

    def _renew(self, coord: Coordinator) -> None:
        if self._is_fresh:
            self._is_fresh = False  # a looper begins at once, and it has just been written
            return
        if self._has_ended():
            coord.request_stop()  # what it was on may be deleted: it must not look held again
            return
        began = self._clock()
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - what storage libraries raise untranslated may pass as well
            logger.warning("a lease could not be renewed, which is tried again in %g s: %s", self._seconds / 4, error)
            return
        with self._lock:
            self._term.renewed(began, self._clock())

    def _has_ended(self) -> bool:
        with self._lock:
            return self._term.has_ended(self._clock())


def _check_alive(store: Store, attempt: str) -> None:
    if attempt not in read_tail(store).having_attempt(attempt).alive():
        raise CheckpointNotFoundError(f"{store.url}: {attempt}", "it is not, or no longer, a committed checkpoint")


@contextlib.contextmanager
def hold(store: Store, attempt: str, holder: str, seconds: float = LEASE_SECONDS) -> Iterator[HeldLease]:
    """Keep a committed checkpoint from being deleted for as long as the block runs, and for as long as ``check`` says so.

    A reader that is killed leaves its lease behind, which counts until it has not changed for ``seconds`` by the clock of
    whoever wants to delete. Raises what ``HeldLease.take`` raises.
    """
    held = HeldLease.take(store, attempt, holder, seconds)
    try:
        yield held
    finally:
        held.release()
