"""The watcher of a directory as a Ray actor: it follows the log for all workers of the cluster, so that none of them does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import ray

from distckpt.coordinator.ray import detached
from distckpt.coordinator.ray.detached import NAMESPACE, Search, answer, find_or_start, name_of
from distckpt.directory.news import News, news_of
from distckpt.errors import CoordinatorUnavailableError
from distckpt.storage import Store, open_store

logger = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
"""How long it goes on when nobody asks anything."""

LOOK_SECONDS = 10.0
"""How often it looks whether anybody still asks."""

POLL_SECONDS = 5.0
"""How long one question waits at the watcher before it is asked again."""

GRACE_SECONDS = 2.0
"""How much longer than that an answer may take before a worker looks at storage by itself."""

FIRST_RETRY = 0.2
LAST_RETRY = 30.0
"""Seconds for which a worker looks by itself before it turns to a watcher again that has not answered."""

OF_SHARDS = ("cache_dir", "cache_bytes", "data", "data_options")
"""Options for what a watcher never reads."""


def watcher_name(directory: str) -> str:
    """The name under which the watcher of a canonical directory is found in the namespace."""
    return name_of("watcher", directory)


class WatcherActor:
    """Knows the newest number of a log: from the coordinator, which tells it, and from the log itself.

    Whoever asks waits here until there is another one than he knows, and storage is looked at once for all of them. It has
    no memory that matters: a restart begins from storage. It ends when nobody has asked for ``idle_seconds``.
    """

    def __init__(self, directory: str, storage_options: dict[str, Any] | None, idle_seconds: float) -> None:
        self._directory = directory
        self._idle_seconds = idle_seconds
        self._news = news_of(open_store(directory, storage_options))
        self._lock = threading.Lock()
        self._read: int | None = None
        self._told = 0
        self._asked = time.monotonic()
        self._asking = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._follow, name="distckpt-follow", daemon=True).start()

    async def newer(self, known: int, wait: float) -> int | None:
        """The newest number, as soon as it is another than the ``known`` one; None if it is not within ``wait`` seconds."""
        self._loop = asyncio.get_running_loop()
        self._asking += 1
        try:
            deadline = self._loop.time() + wait
            while (newest := self._newest()) is None or newest == known:
                left = deadline - self._loop.time()
                if left <= 0:
                    return None
                await self._changed_from(newest, left)
            return newest
        finally:
            self._asking -= 1
            self._asked = time.monotonic()

    async def _changed_from(self, newest: int | None, timeout: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting.add(woken)
        try:
            if self._newest() == newest:  # else it has changed before anybody could have woken us
                await asyncio.wait([woken], timeout=timeout)
        finally:
            self._waiting.discard(woken)

    async def tell(self, seq: int) -> None:
        """The coordinator says that this entry counts."""
        with self._lock:
            self._told = max(self._told, seq)
        self._wake()

    async def describe(self) -> tuple[str, int]:
        """The directory that this actor serves and its process id."""
        return self._directory, os.getpid()

    def _newest(self) -> int | None:
        """None as long as nothing is known."""
        with self._lock:
            return self._told or None if self._read is None else max(self._told, self._read)

    def _wake(self) -> None:
        for woken in self._waiting:
            if not woken.done():
                woken.set_result(None)

    def _follow(self) -> None:
        try:
            while self._asking or time.monotonic() - self._asked < self._idle_seconds:
                self._news.wait(min(LOOK_SECONDS, self._idle_seconds))
                self._heard(self._news.newest)
        except BaseException:
            # It would be asked for ever and know nothing: Ray starts it again.
            logger.exception("the watcher of %s cannot follow its log", self._directory)
            os._exit(1)
        logger.info("the watcher of %s stops: idle", self._directory)
        detached.end(f"the watcher of {self._directory}")

    def _heard(self, newest: int) -> None:
        with self._lock:
            if self._read is not None and newest < self._read:
                self._told = 0  # the directory has been made anew
            changed, self._read = self._read != newest, newest
        if changed and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)


class Teller:
    """Tells the watcher of a directory, if there is one, which entry counts. Never delays or fails whoever tells it."""

    def __init__(self, directory: str) -> None:
        self._name = watcher_name(directory)
        self._newest = 0
        self._more = threading.Event()
        threading.Thread(target=self._run, name="distckpt-tell", daemon=True).start()

    def tell(self, seq: int) -> None:
        """Returns at once. Of several that come while the watcher is being told it hears the newest."""
        self._newest = seq
        self._more.set()

    def _run(self) -> None:
        while self._more.wait():
            self._more.clear()
            try:
                watcher: Any = ray.get_actor(self._name, NAMESPACE)
                watcher.tell.options(num_returns=0).remote(self._newest)
            except ValueError:
                pass  # nobody in this cluster follows the directory
            except Exception as error:  # noqa: BLE001 - Ray has no list of what it raises; the watcher reads the log too
                logger.debug("%s cannot be told: %s", self._name, error)


class RayNews:
    """News from the watcher actor of the cluster that this process is in; from storage while that does not answer."""

    def __init__(self, store: Store, storage_options: Mapping[str, Any] | None) -> None:
        options = {name: value for name, value in (storage_options or {}).items() if name not in OF_SHARDS}
        self._store = store
        self._search: Search[Any] = Search(lambda: _find_watcher(store.url, options or None), self._left)
        self._from_storage: News | None = None
        self._process = os.getpid()
        self._closing: Future[None] = Future()
        self._newest = -1
        self._pause = FIRST_RETRY
        self._silent_until = 0.0

    @property
    def newest(self) -> int:
        """See News.newest."""
        return max(self._newest, 0)

    def wait(self, seconds: float) -> None:
        """See News.wait."""
        deadline = time.monotonic() + seconds
        while not self._closing.done():
            left = max(0.0, deadline - time.monotonic())
            silence = self._silent_until - time.monotonic()
            if silence > 0 or self._process != os.getpid():
                newest = self._look(min(left, max(silence, FIRST_RETRY)))
            else:
                newest = self._ask(min(left, POLL_SECONDS))
            if newest is not None and newest != self._newest:
                self._newest = newest
                return
            if time.monotonic() >= deadline:
                return

    def close(self) -> None:
        """See News.close."""
        if not self._closing.done():
            self._closing.set_result(None)
        if self._from_storage is not None:
            self._from_storage.close()

    def _ask(self, wait: float) -> int | None:
        try:
            actor = self._search.find(FIRST_RETRY)
            newest: int | None = answer(
                actor.newer.remote(self._newest, wait), wait + GRACE_SECONDS, self._left, self._closing
            )
        except concurrent.futures.TimeoutError:
            self._be_by_itself("it does not answer")
        except Exception as error:  # noqa: BLE001 - Ray has no list of what it raises
            self._be_by_itself(f"{type(error).__name__}: {error}")
        else:
            self._pause = FIRST_RETRY
            return newest
        return None

    def _be_by_itself(self, reason: str) -> None:
        if self._closing.done():
            return
        logger.debug("the watcher of %s: %s; storage is looked at instead", self._store.url, reason)
        self._search.drop()
        self._silent_until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LAST_RETRY)

    def _look(self, seconds: float) -> int | None:
        if self._from_storage is None:
            self._from_storage = news_of(self._store)
        self._from_storage.wait(seconds)
        return self._from_storage.newest

    def _left(self) -> CoordinatorUnavailableError:
        return CoordinatorUnavailableError(f"{self._store.url}: this process has left its Ray cluster")


def _find_watcher(directory: str, storage_options: dict[str, Any] | None, idle_seconds: float = IDLE_SECONDS) -> Any:
    """The watcher of a directory, or a new one on this node: whoever asks first has been able to reach the directory."""
    home = ray.get_runtime_context().get_node_id()
    return find_or_start(WatcherActor, watcher_name(directory), home, directory, storage_options, idle_seconds)
