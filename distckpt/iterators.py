"""Follow a directory from outside: wait for checkpoints as they are committed. Needs no Ray and no torch."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from distckpt.directory.chosen import refuse_inside
from distckpt.directory.log import sequence_numbers
from distckpt.directory.newest import newest_committed
from distckpt.directory.news import news_of
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, canonical, join, open_store

POLL_SECONDS = 1.0

_Found = TypeVar("_Found")


def wait_for_new_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    last_checkpoint: str | os.PathLike[str] | None = None,
    seconds_to_sleep: float = POLL_SECONDS,
    timeout: float | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> str | None:
    """The newest committed checkpoint's path, as soon as it is another one than ``last_checkpoint``.

    Looks at least once, then when there is news of the log, at least every ``seconds_to_sleep`` seconds, and once more
    when ``timeout`` seconds are over; None if nothing came by then. A directory that does not exist yet is waited for.
    Paths are compared as text, so the same path saved again is not new here. StorageError if the store cannot be read,
    LogMissingError if there are checkpoints but no log, DamagedError if no log entry can be read, ValueError for a
    checkpoint's own path.
    """
    last = canonical(last_checkpoint) if last_checkpoint else None
    store = open_store(checkpoint_dir, storage_options)
    refuse_inside(store, storage_options)
    follower = _Follower(store)
    with contextlib.closing(news_of(store)) as news:
        return wait_for(functools.partial(follower.path_other_than, last), seconds_to_sleep, timeout, news.wait)


def checkpoints_iterator(
    checkpoint_dir: str | os.PathLike[str],
    min_interval_secs: float = 0,
    timeout: float | None = None,
    timeout_fn: Callable[[], object] | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yields the path of the newest committed checkpoint, then that of each newer one, as they come.

    Which directory a relative path means is settled by the call. Looks only when asked for the next, so a slow consumer
    gets the newest and misses those in between. A path that was saved again counts as new. ``min_interval_secs`` is the
    least time between two yields. When ``timeout`` seconds bring nothing new it ends, unless there is a ``timeout_fn``:
    that is called then, without arguments, and decides: true ends the iterator, false waits again. Retention may retire a
    checkpoint while it is being read: a reader that must not lose it uses ``watch`` instead. Raises what
    ``wait_for_new_checkpoint`` raises.
    """
    return _paths(canonical(checkpoint_dir), min_interval_secs, timeout, timeout_fn, storage_options)


def _paths(
    directory: str,
    min_interval_secs: float,
    timeout: float | None,
    timeout_fn: Callable[[], object] | None,
    storage_options: Mapping[str, Any] | None,
) -> Iterator[str]:
    store = open_store(directory, storage_options)
    refuse_inside(store, storage_options)
    follower = _Follower(store)
    with contextlib.closing(news_of(store)) as news:
        for record in follow(follower.record_other_than, min_interval_secs, timeout, timeout_fn, news.wait):
            yield follower.path(record)


def follow(
    next_after: Callable[[_Found | None], _Found | None],
    min_interval_secs: float,
    timeout: float | None,
    timeout_fn: Callable[[], object] | None,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[_Found]:
    """Yields what ``next_after(the last one)`` finds, at the times and until the end of ``checkpoints_iterator``.

    ``wait`` as for ``wait_for``.
    """
    last: _Found | None = None
    while True:
        started = time.monotonic()
        found = wait_for(functools.partial(next_after, last), POLL_SECONDS, timeout, wait)
        if found is not None:
            last, started = found, time.monotonic()
            yield found
            _sleep_until(started + min_interval_secs)
        elif timeout_fn is None or timeout_fn():
            return
        else:
            _sleep_until(started + POLL_SECONDS)


def wait_for(
    look: Callable[[], _Found | None],
    pause: float,
    timeout: float | None,
    wait: Callable[[float], object] = time.sleep,
) -> _Found | None:
    """What ``look`` finds: looks at once, every ``pause`` seconds, and once more when ``timeout`` seconds are over.

    ``wait`` returns after so many seconds, or as soon as it is worth a look.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        found = look()
        remaining = deadline - time.monotonic()
        if found is not None or remaining <= 0:
            return found
        wait(min(pause, remaining))


class _Follower:
    """Knows the newest committed checkpoint. A look costs one listing of the log, and more only when it has grown.

    While there is no log, what else is in the directory is looked at too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seq = 0
        self._record: CheckpointRecord | None = None

    def look(self) -> CheckpointRecord | None:
        seq = max(sequence_numbers(self._store), default=0)
        if seq != self._seq or not seq:
            self._record = newest_committed(self._store)
            self._seq = seq if self._record is not None else 0
        return self._record

    def record_other_than(self, last: CheckpointRecord | None) -> CheckpointRecord | None:
        record = self.look()
        return record if record is not None and (last is None or record.attempt != last.attempt) else None

    def path_other_than(self, last: str | None) -> str | None:
        record = self.look()
        return self.path(record) if record is not None and self.path(record) != last else None

    def path(self, record: CheckpointRecord) -> str:
        return join(self._store.url, names.checkpoint_folder(record.name, record.number))


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
