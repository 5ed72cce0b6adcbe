"""Threads that work together stop together: those of one process, and with a cluster those of every rank.

A Coordinator carries one request to stop, and the first error, to everyone who works with it. A LooperThread calls a
function again and again until then. Both are TensorFlow's, with the differences that their docstrings name.

A Coordinator is a class of this module, and there are many. The coordinator, in lower case, is the one of a run's
directory (``distckpt.coordinator``), which knows nothing of threads; a cluster carries stops from rank to rank by it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Protocol

from distckpt.errors import CoordinatorError, OutOfRangeError
from distckpt.threads.report import StopReport, is_clean, peer_error, text_of

logger = logging.getLogger(__name__)

CLEAN_STOPS: tuple[type[Exception], ...] = (OutOfRangeError, StopIteration)
"""What is raised at the end of the input: done, not failed."""

LOOK_SECONDS = 0.5  # Python runs the handler of a signal that came just before a wait only after it
SETTLE_SECONDS = 10.0
"""How long join waits until the cluster has heard of this rank's request to stop and says which was the first."""

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class Membership(Protocol):
    """One Coordinator's part in its cluster, from one clear_stop to the next. Safe to use from several threads."""

    def report(self, error: BaseException | None) -> None:
        """Tell all ranks, in the background, that this one has asked for a stop, and because of which error."""

    def settle(self, timeout: float) -> bool:
        """Wait until it is known whose request was the first; False if it is not within ``timeout`` seconds."""

    def leave(self) -> None:
        """Take part no more. Returns at once."""


class Cluster(Protocol):
    """All ranks of a run. ``CheckpointManager.cluster`` is one."""

    @property
    def rank(self) -> int:
        """Which rank this process is."""

    def join(self, listener: Listener, silence_timeout: float) -> Membership:
        """Take part in the next generation. What is heard is given to ``listener``."""


class Listener:
    """A Coordinator as its cluster knows it. Once nobody else holds the Coordinator, it hears nothing any more."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = weakref.ref(coordinator)

    def hear(self, membership: Membership, cause: StopReport | CoordinatorError) -> None:
        """Stop because of the first stop of all ranks, or because this rank will hear of none."""
        coordinator: Coordinator | None = self._coordinator()
        if coordinator is not None:
            coordinator._hear(membership, cause)

    def fail(self, error: BaseException) -> None:
        """Stop because of ``error``, and all ranks with it, unless everyone has been joined."""
        coordinator: Coordinator | None = self._coordinator()
        if coordinator is not None and not coordinator.joined:
            coordinator._stop_because(error)


class _Cause(NamedTuple):
    error: BaseException | None
    traceback: TracebackType | None


class Coordinator:
    """Stops the threads of a process together, on the first error or when one of them asks for it.

    ``clean_stop_exception_types`` are errors that mean "done", not "failed", subclasses included: by default
    OutOfRangeError and StopIteration; an empty list makes every error one.

    With ``cluster`` (``CheckpointManager.cluster``) a stop on any rank stops them all, within milliseconds: every rank
    mirrors it, so ``should_stop`` costs nothing. The first error, by arrival at the coordinator actor, is everyone's:
    the rank that had it raises it again from ``join``, the others a PeerFailedError that names rank, host, error and
    traceback. A rank from which nothing is heard for ``silence_timeout`` seconds counts as failed: RankSilentError.
    Give more than the longest time that Python stands still on a rank (a compilation that holds the interpreter).
    A rank whose manager has been closed, or that dropped its Coordinator, has left and is not missed. All ranks make
    their Coordinators, and clear them, in the same order. When the coordinator cannot be reached, training goes on;
    as soon as one can be, ranks tell again what they know.

    Where TensorFlow's differs: an exception that is given outside of its ``except`` block is recorded as it is, not as
    a ValueError; an error that comes second, or after a plain request, is logged and not lost; ``join`` notices the end
    of threads at once; a signal handler may request a stop, look for one and wait for it, whatever it interrupts.

    Raises ValueError for a ``silence_timeout`` that is not positive.
    """

    def __init__(
        self,
        clean_stop_exception_types: Iterable[type[BaseException]] | None = None,
        *,
        cluster: Cluster | None = None,
        silence_timeout: float = 60.0,
    ) -> None:
        if not silence_timeout > 0:
            raise ValueError(f"silence_timeout must be a positive number of seconds, not {silence_timeout!r}")
        self._clean = CLEAN_STOPS if clean_stop_exception_types is None else tuple(clean_stop_exception_types)
        self._cluster = cluster
        self._silence_timeout = silence_timeout
        self._lock = threading.RLock()
        # At most one entry. A signal handler may come between any two steps, so a stop and its error are one step.
        self._cause: dict[str, _Cause] = {}
        self._wakers: set[threading.Lock] = set()
        self._joined = False
        self._registered: set[threading.Thread] = set()
        self._membership: Membership | None = None
        self._leave: Callable[[], object] = bool  # nothing to leave
        self._enter()

    # ---- stop ------------------------------------------------------------------------------------------------------

    def request_stop(self, ex: BaseException | ExcInfo | None = None) -> None:
        """Ask everyone to stop, because of ``ex`` if it is given: an exception or what ``sys.exc_info()`` returned.

        Only the first request counts; a later error is logged. Nothing is raised here, with one exception: once
        everyone has been joined nobody would learn of ``ex``, so it is raised to the caller. What is neither is
        recorded as a ValueError.
        """
        error = _exception(ex)
        if isinstance(error, self._clean):
            error = None
        with self._lock:  # never held while logging: a handler may have interrupted its thread inside of logging
            if self._joined and error is not None:
                raise error
            first = self._record(cause := _Cause(error, getattr(error, "__traceback__", None)))
            membership = self._membership
        if first is cause:
            if error is None:
                logger.debug("asked to stop")
            else:
                logger.info("stopping because of %s", _line(error))
            if membership is not None:
                membership.report(error)
        elif error is not None and error is not first.error:
            logger.warning("an error after a stop had been requested: %s", _line(error), exc_info=error)

    def should_stop(self) -> bool:
        """Whether a stop has been requested, on any rank."""
        return bool(self._cause)

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Wait for a stop; False if there was none within ``timeout`` seconds (0 or less only looks)."""
        while timeout is None and not self._wait(_waker(), LOOK_SECONDS):
            pass
        return self._wait(_waker(), timeout or 0.0)

    @contextlib.contextmanager
    def stop_on_exception(self) -> Iterator[None]:
        """Report what the block raises; the code after the block goes on.

        TensorFlow swallows everything. Here KeyboardInterrupt, SystemExit and what else is no Exception are reported
        and raised again, since they are meant to end more than this block; ``sys.exit()`` without an error is a plain
        stop, and a generator that is closed inside of the block asks for none. If everyone has been joined already the
        exception comes out too.
        """
        try:
            yield
        except BaseException as error:
            self._stop_because(error)
            if not isinstance(error, Exception):
                raise

    def clear_stop(self) -> None:
        """Start anew: no stop, no error, not joined. With a cluster all ranks call it alike; late reports are dropped."""
        with self._lock:
            self._leave()
            self._membership = None
            self._joined = False
            self._cause.clear()
            self._enter()

    def raise_requested_exception(self) -> None:
        """Raise the error that made everyone stop, if there is one; it stays recorded."""
        for cause in tuple(self._cause.values()):
            if cause.error is not None:
                raise cause.error.with_traceback(cause.traceback)

    # ---- threads ---------------------------------------------------------------------------------------------------

    def register_thread(self, thread: threading.Thread) -> None:
        """Have the next join wait for ``thread``."""
        with self._lock:
            self._registered.add(thread)

    @property
    def joined(self) -> bool:
        """Whether join has come to its end, be it by an error."""
        return self._joined

    def join(
        self,
        threads: Iterable[threading.Thread] | None = None,
        stop_grace_period_secs: float = 120,
        ignore_live_threads: bool = False,
    ) -> None:
        """Wait until ``threads`` and the registered ones have ended; then raise the error that made them stop, if any.

        They may run for ever as long as nobody requests a stop. From then on they have ``stop_grace_period_secs``
        (none at 0 or less); RuntimeError names those that still run after that, unless ``ignore_live_threads``, which
        only logs them. The error that was reported comes first. Threads that all end by themselves are no stop.
        Calling it again raises the same error again, until ``clear_stop``.

        Threads that are registered while it waits are left to the next join (TensorFlow forgets them); a thread that
        was not started counts as ended, and the calling thread is not waited for.
        """
        with self._lock:
            waited = self._registered.union(threads or ())
        others = waited - {threading.current_thread()}
        ended = self._watch_ends(others, waker := _waker())
        while not ended.is_set() and not self.should_stop():
            self._wait(waker, LOOK_SECONDS)
        if self.should_stop():
            ended.wait(max(0.0, min(stop_grace_period_secs, threading.TIMEOUT_MAX)))
            self._settle()
        stragglers = sorted(thread.name for thread in others if thread.is_alive())
        with self._lock:
            self._joined = True
            self._registered -= waited
            failed = self._error is not None
        if stragglers and (ignore_live_threads or failed):
            logger.warning("%s", self._still_running(stragglers))
        self.raise_requested_exception()
        if stragglers and not ignore_live_threads:
            raise RuntimeError(self._still_running(stragglers))

    def _watch_ends(self, threads: Iterable[threading.Thread], waker: threading.Lock) -> threading.Event:
        """An event that is set as soon as none of them is alive; ``waker`` is woken then."""
        ended = threading.Event()

        def watch() -> None:
            try:
                while (alive := next((thread for thread in threads if thread.is_alive()), None)) is not None:
                    alive.join()
            finally:  # whatever happens to this thread, ``join`` looks for itself then who still runs
                ended.set()
                _wake(waker)

        if any(thread.is_alive() for thread in threads):
            threading.Thread(target=watch, name="distckpt-join", daemon=True).start()
        else:
            ended.set()
        return ended

    def _still_running(self, stragglers: list[str]) -> str:
        where = f" on rank {self._cluster.rank}" if self._cluster is not None else ""
        return f"Coordinator stopped with threads still running{where}: {' '.join(stragglers)}"

    # ---- what stops it ---------------------------------------------------------------------------------------------

    def _stop_because(self, raised: BaseException) -> None:
        if isinstance(raised, SystemExit) and not raised.code:
            self.request_stop()
        elif not isinstance(raised, GeneratorExit):
            self.request_stop(raised)

    @property
    def _error(self) -> BaseException | None:
        return next((cause.error for cause in tuple(self._cause.values())), None)

    def _record(self, cause: _Cause) -> _Cause:
        """The first cause, which is the one that counts. Wakes everyone."""
        first = self._cause.setdefault("first", cause)
        for waker in tuple(self._wakers):
            _wake(waker)
        return first

    def _wait(self, waker: threading.Lock, timeout: float) -> bool:
        """Wait until there is a stop or ``waker`` is woken.

        An Event would deadlock with a handler that interrupts it, a Condition miss one that comes just before.
        """
        self._wakers.add(waker)
        try:
            return (
                self.should_stop()
                or waker.acquire(timeout=max(0, min(timeout, threading.TIMEOUT_MAX)))
                or self.should_stop()
            )
        finally:
            self._wakers.discard(waker)

    # ---- the other ranks -------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._cluster is None:
            return
        with self._lock:  # what is heard at once waits until it is known from which membership it comes
            self._membership = self._cluster.join(Listener(self), self._silence_timeout)
            finalizer = weakref.finalize(self, self._membership.leave)
            finalizer.atexit = False
            self._leave = finalizer
            if self.should_stop():  # a signal handler has requested it meanwhile, when there was nobody to tell
                self._membership.report(self._error)

    def _settle(self) -> None:
        membership = self._membership
        if membership is not None and not membership.settle(SETTLE_SECONDS):
            logger.warning(
                "the other ranks have not heard yet that this one stops: the coordinator of the run does not answer"
            )

    def _hear(self, membership: Membership, cause: StopReport | CoordinatorError) -> None:
        """The first stop of all ranks, or why this rank will hear of none. The cluster's word is final."""
        with self._lock:
            if membership is not self._membership or (self._joined and self.should_stop()):
                return
            error, own, late = self._error_of(cause), self._error, self._joined
            if error is not None and not late:
                error.__context__ = own
                self._cause["first"] = _Cause(error, getattr(error, "__traceback__", None))
            self._record(_Cause(None, None))
        logger.info("stopping on all ranks: %s", cause)
        if error is not None and late:
            logger.warning("an error after everyone was joined: %s", _line(error))
        elif error is not None and own is not None:
            logger.warning("this rank's own error was not the first: %s", _line(own), exc_info=own)

    def _error_of(self, cause: StopReport | CoordinatorError) -> CoordinatorError | None:
        """What join is to raise, if it is anything else than this rank's own error: a report is only its likeness."""
        if not isinstance(cause, StopReport):
            return cause
        own = self._cluster is not None and cause.rank == self._cluster.rank and cause.silent is None
        return None if own or is_clean(cause, self._clean) else peer_error(cause)


def _exception(ex: object) -> BaseException | None:
    """What was given to request_stop, as an exception with its traceback."""
    if ex is None or isinstance(ex, BaseException):
        return ex
    if isinstance(ex, tuple) and len(ex) == 3 and isinstance(ex[1], BaseException):
        return ex[1].with_traceback(ex[2])
    return ValueError(f"request_stop takes an exception or what sys.exc_info() returned for one, not {ex!r}")


def _waker() -> threading.Lock:
    (waker := threading.Lock()).acquire()
    return waker


def _wake(waker: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # it has been woken already
        waker.release()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}"
