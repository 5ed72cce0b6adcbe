"""A rank's line to the coordinator: in this process, or a Ray actor that may die and come back."""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Protocol

from distckpt.coordinator.messages import OpenRun, Refused, Reply, Request, RunOpened, Unknown
from distckpt.coordinator.shell import Settings, Shell
from distckpt.errors import CoordinatorUnavailableError, DistckptError, FencedError
from distckpt.storage import Store
from distckpt.world import World, new_token

if TYPE_CHECKING:
    import ray

    from distckpt.coordinator.actor import CoordinatorActor

    _Actor = ray.actor.ActorHandle[CoordinatorActor]

logger = logging.getLogger(__name__)

POLL_SECONDS = 20.0
"""How long one question waits at the coordinator before it is asked again."""

LOOK_SECONDS = 1.0
"""How often a rank that waits for an answer looks whether it is still in the Ray cluster."""

GRACE_SECONDS = 60.0
"""How long a rank waits for a coordinator that does not answer at all (it may be restarting)."""


class Line(Protocol):
    """Carries requests to the coordinator and answers back. Safe to use from several threads."""

    def ask(self, request: Request, timeout: float) -> Reply:
        """The answer. CoordinatorUnavailableError when there is none within ``timeout`` seconds."""

    def close(self) -> None:
        """Hang up."""


class LocalLine:
    """The coordinator lives in this process, for a world of one: no Ray is needed."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def ask(self, request: Request, timeout: float) -> Reply:
        """See Line.ask."""
        future = self._shell.ask(request)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise CoordinatorUnavailableError(
                f"no answer to {type(request).__name__} within {timeout:g} s: the store may be slow or unreachable"
            ) from None

    def close(self) -> None:
        """Stop the coordinator once it has finished what it is doing."""
        self._shell.close()


class RayLine:
    """The coordinator is a named actor. Lost calls are repeated; a dead actor is looked up, or started, again."""

    def __init__(self, directory: str, storage_options: dict[str, Any] | None, settings: Settings, home: str) -> None:
        self._directory = directory
        self._storage_options = storage_options
        self._settings = settings
        self._home = home
        self._lock = threading.Lock()
        self._actor: _Actor | None = None
        self._search: Future[_Actor] | None = None
        self._job = ""

    def ask(self, request: Request, timeout: float) -> Reply:
        """See Line.ask."""
        import ray.exceptions

        deadline = time.monotonic() + timeout
        silent_since: float | None = None
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise CoordinatorUnavailableError(
                    f"{self._directory}: no answer to {type(request).__name__} within {timeout:g} s"
                )
            wait = min(POLL_SECONDS, left)
            try:
                actor = self._find(wait)
                reply = self._answer(actor.ask.remote(request, wait), wait + POLL_SECONDS)
            except (ray.exceptions.RayActorError, FutureTimeoutError) as error:
                if silent_since is None:
                    silent_since = time.monotonic()
                    logger.warning(
                        "the coordinator of %s does not answer: %s; asking again", self._directory, _text(error)
                    )
                self._lost(error, silent_since)
                continue
            silent_since = None
            if reply is not None:
                return reply

    def _answer(self, asked: ray.ObjectRef[Reply | None], timeout: float) -> Reply | None:
        """Not by ``ray.get``, from which a thread may never return when its process leaves the cluster meanwhile."""
        import ray

        future = asked.future()
        deadline = time.monotonic() + timeout
        while True:
            try:
                reply: Reply | None = future.result(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
            except FutureTimeoutError:
                if not ray.is_initialized():
                    raise self._left() from None
                if time.monotonic() >= deadline:
                    raise
            else:
                return reply

    def replace(self) -> None:
        """Put a fresh coordinator in the place of one that has stopped for ever."""
        import ray

        with self._lock:
            actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """The actor goes on without us, and exits by itself when it is idle."""

    def _find(self, timeout: float) -> _Actor:
        """The actor, which one thread looks up for all who ask: without its head node Ray would answer none of them."""
        import ray

        if not ray.is_initialized():
            raise self._left()  # else Ray would look for a cluster by itself, and start one if it finds none
        job = ray.get_runtime_context().get_job_id()
        with self._lock:
            if self._actor is not None and self._job == job:
                return self._actor
            if self._job != job:  # the process has left the cluster and come back, and what it held is of no use
                self._job, self._search = job, None
            if self._search is None:
                self._search = Future()
                threading.Thread(target=self._look, args=(self._search,), name="distckpt-search", daemon=True).start()
            search = self._search
        return search.result(timeout)

    def _look(self, search: Future[_Actor]) -> None:
        from distckpt.coordinator.actor import find_or_start

        try:
            actor = find_or_start(self._directory, self._storage_options, self._settings, self._home)
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait for the search
            self._found(search, None)
            search.set_exception(error)
        else:
            self._found(search, actor)
            search.set_result(actor)

    def _found(self, search: Future[_Actor], actor: _Actor | None) -> None:
        with self._lock:
            if self._search is search:
                self._actor, self._search = actor, None

    def _left(self) -> CoordinatorUnavailableError:
        return CoordinatorUnavailableError(
            f"{self._directory}: this process has left its Ray cluster (ray.shutdown) before its manager was closed. "
            "Close the manager first, or join the cluster again with ray.init"
        )

    def _lost(self, error: Exception, since: float) -> None:
        if time.monotonic() - since > GRACE_SECONDS:
            raise CoordinatorUnavailableError(
                f"{self._directory}: the coordinator has not answered for {GRACE_SECONDS:g} s: {_text(error)}"
            ) from error
        with self._lock:
            self._actor = None
        time.sleep(0.2)


class Session:
    """One rank's standing in one run. Opens the run again whenever the coordinator has been replaced."""

    def __init__(self, line: Line, opening: OpenRun) -> None:
        self._line = line
        self._opening = opening
        self._lock = threading.Lock()
        self._opened: RunOpened | None = None

    def open(self) -> RunOpened:
        """Report to the coordinator. Raises what it refuses with: StaleRunError, FencedError, StorageError ..."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open(0)
            return self._opened

    def ask(self, question: Callable[[int], Request], timeout: float) -> Reply:
        """Ask ``question(run)``; an Unknown answer, after the run was opened again, is left to the caller.

        Raises the error of a Refused answer, and CoordinatorUnavailableError.
        """
        opened = self.open()
        reply = self._line.ask(question(opened.run), timeout)
        if isinstance(reply, Unknown):
            with self._lock:
                if self._opened is opened:  # else another thread has opened the run again meanwhile
                    self._opened = self._open(opened.run)
        return _raised(reply)

    def close(self) -> None:
        """Hang up. What was asked and not yet answered stays unanswered."""
        self._line.close()

    def _open(self, run: int) -> RunOpened:
        opening = dataclasses.replace(self._opening, run=run)
        reply = _raised(self._line.ask(opening, max(GRACE_SECONDS, self._opening.save_timeout)))
        if not isinstance(reply, RunOpened):
            raise CoordinatorUnavailableError(f"unexpected answer to OpenRun: {reply!r}")
        return reply


def open_session(
    store: Store, storage_options: dict[str, Any] | None, world: World, opening: OpenRun, settings: Settings
) -> Session:
    """Find or start the coordinator of the store's directory and report to it. A collective where ranks share.

    A world of one has its coordinator in the process; more ranks meet at a Ray actor, for which rank 0 joins the
    running Ray cluster or starts one on its host.
    """
    token = world.token
    if token is None:
        if world.share is None:
            raise ValueError("give run_id: these ranks have no other way to know which incarnation of the job they are")
        token = world.share(new_token())
    opening = dataclasses.replace(opening, token=_unused(store.url, token))
    if world.size == 1:
        shell = Shell(store, dataclasses.replace(settings, idle_timeout=None))
        try:
            shell.start()
            return _opened(Session(LocalLine(shell), opening))
        except BaseException:
            shell.close()  # or it would go on claiming the directory that its maker has given up
            raise
    from distckpt.coordinator.actor import join_cluster

    line = RayLine(store.url, storage_options, settings, join_cluster(world))
    try:
        return _opened(Session(line, opening))
    except FencedError:
        # The actor served a run that another cluster took over from; ours is newer than both.
        line.replace()
        return _opened(Session(line, opening))


def _unused(directory: str, token: str) -> str:
    """The token of a run of its own for each manager: ranks that were given one for all would hear old answers again."""
    with _tokens_lock:
        _tokens[directory, token] += 1
        count = _tokens[directory, token]
    return token if count == 1 else f"{token}/{count}"


_tokens: Counter[tuple[str, str]] = Counter()
_tokens_lock = threading.Lock()


def _opened(session: Session) -> Session:
    session.open()
    return session


def _raised(reply: Reply) -> Reply:
    if isinstance(reply, Refused):
        raise _copy(reply.error)
    return reply


def _text(error: BaseException) -> str:
    return str(error) or "Ray itself does not answer; has its head node died?"


def _copy(error: DistckptError) -> DistckptError:
    # Several futures may hold the same instance; raising it twice would knot their tracebacks together.
    return copy.copy(error)
