"""Actors that a directory has one of: named, detached, restarting; found, or started by whoever asks first."""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import ray

logger = logging.getLogger(__name__)

NAMESPACE = "distckpt"

LOOK_SECONDS = 1.0
"""How often whoever waits for an answer looks whether it is still in the Ray cluster."""

_Handle = TypeVar("_Handle")
_Answer = TypeVar("_Answer")


def name_of(role: str, directory: str) -> str:
    """The name under which the actor of a canonical directory is found in its namespace."""
    return f"{role}-{hashlib.sha256(directory.encode()).hexdigest()[:24]}"


def find_or_start(kind: type, name: str, home: str, *arguments: object) -> Any:
    """The running actor of that name, or a new one on the node ``home``; has answered ``describe`` when it is returned."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(kind)
    actor = remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=100_000,
        num_cpus=0,
        memory=1,  # bytes: Ray takes an actor that claims nothing at all to any node, whatever the strategy says
        scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=True),
    ).remote(*arguments)
    ray.get(actor.describe.remote())
    return actor


def end(what: str) -> None:
    """End the actor in whose process this is called, for ever; ``what`` it is, for the log."""
    try:
        # Killing itself is the one exit that Ray neither restarts nor reports as a failure of the job.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
    except BaseException:
        # It has come to its end, and an actor that stays would keep another from beginning.
        logger.exception("%s cannot stop in Ray's way", what)
        os._exit(1)


def answer(
    asked: ray.ObjectRef[_Answer], timeout: float, left: Callable[[], Exception], closing: Future[None] | None = None
) -> _Answer:
    """What the actor answers. TimeoutError of ``concurrent.futures`` after ``timeout`` seconds, or once ``closing`` is done.

    Raises ``left()`` when the process has left its cluster. Not by ``ray.get``, from which a thread may never return then.
    """
    future = asked.future()
    deadline = time.monotonic() + timeout
    waited: set[Future[Any]] = {future} if closing is None else {future, closing}
    while not future.done():
        remaining = max(0.0, deadline - time.monotonic())
        concurrent.futures.wait(waited, min(LOOK_SECONDS, remaining), concurrent.futures.FIRST_COMPLETED)
        if future.done():
            break
        if not ray.is_initialized():
            raise left()
        if time.monotonic() >= deadline or (closing is not None and closing.done()):
            raise concurrent.futures.TimeoutError
    found: _Answer = future.result()
    return found


class Search(Generic[_Handle]):
    """Looks an actor up in one thread for all who ask: without its head node Ray would answer none of them.

    ``start`` finds or starts it; ``left`` makes the error for a process that is in no cluster (any more).
    """

    def __init__(self, start: Callable[[], _Handle], left: Callable[[], Exception]) -> None:
        self._start = start
        self._left = left
        self._lock = threading.Lock()
        self._actor: _Handle | None = None
        self._search: Future[_Handle] | None = None
        self._job = ""

    def find(self, timeout: float) -> _Handle:
        """The actor. Raises what looking it up raises, or ``concurrent.futures.TimeoutError``."""
        if not ray.is_initialized():
            raise self._left()  # else Ray would look for a cluster by itself, and start one if it finds none
        job = ray.get_runtime_context().get_job_id()
        with self._lock:
            if self._actor is not None and self._job == job:
                return self._actor
            if self._job != job:  # the process has left the cluster and come back, and what it held is of no use
                self._job, self._search = job, None
            if self._search is None:
                search: Future[_Handle] = Future()
                threading.Thread(target=self._look, args=(search,), name="distckpt-search", daemon=True).start()
                self._search = search
            search = self._search
        return search.result(timeout)

    def drop(self) -> _Handle | None:
        """Look it up again before the next question. Returns what was known."""
        with self._lock:
            actor, self._actor = self._actor, None
        return actor

    def _look(self, search: Future[_Handle]) -> None:
        try:
            actor = self._start()
            self._found(search, actor)
            search.set_result(actor)
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait for the search
            self._found(search, None)
            if not search.done():
                search.set_exception(error)

    def _found(self, search: Future[_Handle], actor: _Handle | None) -> None:
        with self._lock:
            if self._search is search:
                self._actor, self._search = actor, None
