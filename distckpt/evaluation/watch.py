"""``distckpt.watch``: the checkpoints of a run, one after the other, each under a lease, alone or in a group of workers."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distckpt.coordinator.client.news import find_news
from distckpt.directory.chosen import refuse_inside
from distckpt.directory.lease import LEASE_SECONDS
from distckpt.directory.news import News
from distckpt.directory.sharing import Settings
from distckpt.evaluation.claims import Worker
from distckpt.evaluation.deliveries import Delivery, Source
from distckpt.evaluation.newest import Newest
from distckpt.evaluation.watched import OnReport, WatchedCheckpoint
from distckpt.format.json.group import MODES, ON_LAGS, STARTS, Mode, OnLag, Start
from distckpt.format.json.lease import MAX_LEASE_SECONDS
from distckpt.storage import PathLike, Store, open_store, placed

if TYPE_CHECKING:
    from typing_extensions import Self

BACKOFF = 10.0

_LONGEST_WAIT = 60.0
_LONGEST_NAME = 256


def watch(
    directory: PathLike,
    *,
    group: str | None = None,
    mode: Mode | None = None,
    worker: str | None = None,
    timeout: float | None = None,
    timeout_fn: Callable[[], object] | None = None,
    start: Start | None = None,
    max_backlog: int | None = None,
    on_lag: OnLag | None = None,
    max_attempts: int | None = None,
    max_in_flight: int = 1,
    backoff: float = BACKOFF,
    lease_seconds: float = LEASE_SECONDS,
    on_report: OnReport | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: PathLike | None = None,
    data: PathLike | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Watch:
    """The committed checkpoints of ``directory``, as they come; each under a lease, so that it is not deleted meanwhile.

    ::

        for checkpoint in distckpt.watch(directory, group="eval", mode="all"):
            with checkpoint:
                model.load_state_dict(checkpoint.load("model"))
                checkpoint.report({"loss": evaluate(model)})

    Without a ``group`` it is the newest one that this watch has not had. The workers of a group share the work, on whatever
    machines, with nothing in common but the storage: each checkpoint goes to one of them, and to another if that one gives
    it back or dies. ``mode`` "latest" gives the newest that nobody of the group has had, "all" every one, in the order of
    commits. A group is made by its first worker, and remembers what was done for ever.

    Args:
        worker: who this is, for people; by default the host and the process.
        timeout, timeout_fn: end when so many seconds brought nothing, or ask then: as for ``checkpoints_iterator``. It ends
            too when the run has said that training is over and nothing is left to do for anybody of the group.
        start: a new group begins with the "earliest" that there is (the default), or with the "latest".
        max_backlog, on_lag: so many waiting ones (16) are kept from retention for a group of mode "all". Older ones are
            skipped where retention wants their room, and the group's record says which ("skip"); or kept ("hold"); or kept,
            and the trainer's next save waits until there are fewer ("block").
        max_attempts: a checkpoint that was rejected so often (3) is set aside and listed with its error.
        max_in_flight: so many that are not settled yet this worker may have; ``next`` waits while it has them.
        backoff: seconds before something that was given back is delivered again; doubled each time, up to five minutes.
        lease_seconds: a worker that has not renewed its lease for so long is taken for dead, and replaced.
        on_report: called with the checkpoint and its metrics after each report, to hand them on.
        storage_options, cache_dir, data, data_options: as for ``open``.

    Settings that are left out are the group's. Raises GroupMismatchError, at once, for settings that are not the group's;
    ValueError for those that make no sense, or need a group, and for a checkpoint's own path. ``next`` raises
    StorageError if the store cannot be read, LogMissingError and DamagedError as ``wait_for_new_checkpoint``.
    """
    for name, chosen, known in (("mode", mode, MODES), ("on_lag", on_lag, ON_LAGS), ("start", start, STARTS)):
        if chosen is not None and chosen not in known:
            raise ValueError(f"{name} is {chosen!r}, and not one of {', '.join(map(repr, known))}")
    if not 0 < lease_seconds <= MAX_LEASE_SECONDS or not backoff >= 0:
        raise ValueError(f"lease_seconds is at most {MAX_LEASE_SECONDS:g}, and neither it nor backoff is below 0")
    if max_in_flight < 1 or (max_attempts is not None and max_attempts < 1) or (max_backlog or 0) < 0:
        raise ValueError("max_in_flight and max_attempts are at least 1, max_backlog at least 0")
    settings = Settings(mode, start, max_backlog, on_lag, max_attempts)
    if worker is not None and not _is_one_line(worker):
        raise ValueError(
            f"worker is up to {_LONGEST_NAME} printable characters that say who this is, not {worker!r:.200}"
        )
    name = worker if worker is not None else f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
    options = placed(storage_options, cache_dir=cache_dir, data=data, data_options=data_options)
    store = open_store(directory, options)
    refuse_inside(store, options)
    source: Source
    if group is None:
        if mode == "all" or settings != Settings(mode):
            raise ValueError(
                'mode="all", start, max_backlog, on_lag and max_attempts are those of a group: give its name'
            )
        source = Newest(store, name, lease_seconds)
    else:
        source = Worker(store, group, name, settings, lease_seconds, backoff)
    return Watch(store, find_news(store, options), source, group, timeout, timeout_fn, max_in_flight, on_report)


def _is_one_line(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME


class Watch(Iterator[WatchedCheckpoint]):
    """See ``watch``. As a context it is closed at its end; any thread may ask for the next, one at a time."""

    def __init__(
        self,
        store: Store,
        news: News,
        source: Source,
        group: str | None,
        timeout: float | None,
        timeout_fn: Callable[[], object] | None,
        max_in_flight: int,
        on_report: OnReport | None,
    ) -> None:
        self._store = store
        self._source = source
        self._group = group
        self._timeout = math.inf if timeout is None else timeout
        self._timeout_fn = timeout_fn
        self._most = max_in_flight
        self._on_report = on_report
        self._news = news
        self._turn = threading.Lock()
        self._given: list[WatchedCheckpoint] = []
        self._settled = threading.Condition()
        self._is_over = False

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> WatchedCheckpoint:
        with self._turn:
            self._make_room()
            began = time.monotonic()
            while not self._is_over:
                found = self._source.get()
                if found is not None:
                    return self._handed(found)
                if self._source.is_drained():
                    break
                left = began + self._timeout - time.monotonic()
                if left > 0:
                    self._news.wait(min(left, self._source.pause(), _LONGEST_WAIT))
                elif self._timeout_fn is None or self._timeout_fn():
                    break
                else:
                    began = time.monotonic()
            self._end()
            raise StopIteration

    def close(self) -> None:
        """End it, also while another thread waits for the next one. What was not settled is released. Twice is fine."""
        self._end()
        for checkpoint in self._unsettled():
            checkpoint.release()

    def _end(self) -> None:
        self._is_over = True
        self._news.close()
        self._notify()

    def _notify(self) -> None:
        with self._settled:
            self._settled.notify_all()

    def _unsettled(self) -> list[WatchedCheckpoint]:
        self._given = [checkpoint for checkpoint in self._given if not checkpoint.is_settled]
        return self._given

    def _make_room(self) -> None:
        """Wait until this worker may have one more."""
        if self._group is None:  # there is nobody whom it would matter to
            for checkpoint in self._unsettled():
                checkpoint.release()
        if self._most == 1 and self._unsettled():
            raise RuntimeError(
                f"{self._given[0].path} is not settled yet, and max_in_flight is 1: use it in a with block, or call ack, "
                "release or reject, before asking for the next"
            )
        with self._settled:
            self._settled.wait_for(lambda: self._is_over or len(self._unsettled()) < self._most)

    def _handed(self, found: Delivery) -> WatchedCheckpoint:
        checkpoint = WatchedCheckpoint(
            self._store, found, self._group, self._source.worker, self._notify, self._on_report
        )
        self._given.append(checkpoint)
        if self._is_over:  # closed meanwhile
            checkpoint.release()
            raise StopIteration
        return checkpoint
