"""A rank's line to a coordinator that is a Ray actor, which may die and come back."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from distckpt.coordinator.messages import Reply, Request, kind_of
from distckpt.coordinator.ray.actor import CoordinatorActor, find_or_start
from distckpt.coordinator.shell.shell import Settings
from distckpt.errors import CoordinatorFailedError, CoordinatorUnavailableError, DistckptError

logger = logging.getLogger(__name__)

POLL_SECONDS = 20.0
"""How long one question waits at the coordinator before it is asked again."""

LOOK_SECONDS = 1.0
"""How often a rank that waits for an answer looks whether it is still in the Ray cluster."""

GRACE_SECONDS = 60.0
"""How long a rank waits for a coordinator that does not answer at all (it may be restarting)."""

if TYPE_CHECKING:
    _Actor = ray.actor.ActorHandle[CoordinatorActor]


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
        deadline = time.monotonic() + timeout
        silent_since: float | None = None
        while (left := deadline - time.monotonic()) > 0:
            wait = min(POLL_SECONDS, left)
            try:
                actor = self._find(wait)
                patience = min(wait + POLL_SECONDS, deadline - time.monotonic())
                reply = self._answer(actor.answer.remote(request, wait), patience)
            except DistckptError:
                raise
            except ray.exceptions.RayTaskError as error:  # the actor lives; what was asked of it could not be read, say
                raise CoordinatorFailedError(self._directory, _text(error).strip().rpartition("\n")[2]) from error
            except Exception as error:  # noqa: BLE001 - Ray has no list of what it raises; silence ends it
                self._drop()
                if time.monotonic() >= deadline:
                    break  # it may be at work on the answer, or dead: this time is too short to tell
                if silent_since is None:
                    silent_since = time.monotonic()
                    logger.warning(
                        "the coordinator of %s does not answer: %s; asking again", self._directory, _text(error)
                    )
                self._check_silence(error, silent_since)
                time.sleep(0.2)
                continue
            silent_since = None
            if reply is not None:
                return reply
        raise CoordinatorUnavailableError(f"{self._directory}: no answer to {kind_of(request)} within {timeout:g} s")

    def _answer(self, asked: ray.ObjectRef[Reply | None], timeout: float) -> Reply | None:
        """Not by ``ray.get``, from which a thread may never return when its process leaves the cluster meanwhile."""
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
        with self._lock:
            actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """The actor goes on without us, and exits by itself when it is idle."""

    def _find(self, timeout: float) -> _Actor:
        """The actor, which one thread looks up for all who ask: without its head node Ray would answer none of them."""
        if not ray.is_initialized():
            raise self._left()  # else Ray would look for a cluster by itself, and start one if it finds none
        job = ray.get_runtime_context().get_job_id()
        with self._lock:
            if self._actor is not None and self._job == job:
                return self._actor
            if self._job != job:  # the process has left the cluster and come back, and what it held is of no use
                self._job, self._search = job, None
            if self._search is None:
                search: Future[_Actor] = Future()
                threading.Thread(target=self._look, args=(search,), name="distckpt-search", daemon=True).start()
                self._search = search
            search = self._search
        return search.result(timeout)

    def _look(self, search: Future[_Actor]) -> None:
        try:
            actor = find_or_start(self._directory, self._storage_options, self._settings, self._home)
            self._found(search, actor)
            search.set_result(actor)
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait for the search
            self._found(search, None)
            if not search.done():
                search.set_exception(error)

    def _found(self, search: Future[_Actor], actor: _Actor | None) -> None:
        with self._lock:
            if self._search is search:
                self._actor, self._search = actor, None

    def _left(self) -> CoordinatorUnavailableError:
        return CoordinatorUnavailableError(
            f"{self._directory}: this process has left its Ray cluster (ray.shutdown) before its manager was closed. "
            "Close the manager first, or join the cluster again with ray.init"
        )

    def _drop(self) -> None:
        """Look the actor up again before the next question."""
        with self._lock:
            self._actor = None

    def _check_silence(self, error: Exception, since: float) -> None:
        if time.monotonic() - since > GRACE_SECONDS:
            raise CoordinatorUnavailableError(
                f"{self._directory}: the coordinator has not answered for {GRACE_SECONDS:g} s: {_text(error)}"
            ) from error


def _text(error: BaseException) -> str:
    return str(error) or "Ray itself does not answer; has its head node died?"
