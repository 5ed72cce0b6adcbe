"""What dead writers have left in a directory, and how it is deleted: one judge, for the coordinator and for people."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass

from distckpt.directory.contents import attempts, checkpoint_folders, objects_of_attempt
from distckpt.directory.groups import group_names
from distckpt.directory.log import read_commit_id, read_entry, referred_pages, sequence_numbers
from distckpt.directory.pages import old_pages
from distckpt.directory.stillness import Stillness, elapsed
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.storage import (
    MOST_NAMES,
    PROBES,
    ObjectInfo,
    Store,
    SupportsHidden,
    SupportsSweep,
    at_most,
    parts_of,
)

logger = logging.getLogger(__name__)

GARBAGE_SECONDS = 3600.0
"""How long one observer must have seen it unchanged to take it for dead. That spares copies which somebody is just making."""

FAILED_SECONDS = 60.0
"""The same for an attempt that was begun here and has failed, so that it can never be committed, and takes room; and for

hidden things beside the attempts: who writes a small object for longer has to write it again, and loses nothing. And for
pages of the log that no entry needs any more: who has an entry in hand that is gone by now may just be reading them.
"""

LEFT_SECONDS = 10.0
"""The same for what a predecessor had in work when a coordinator took over, whose ranks may not have heard of that yet.

It never was a checkpoint and never will be. But who still writes to it should be told that the job was replaced, and not
that its files are gone.
"""

SWEPT = ("", names.LOG, names.PAGES, names.LEASES, names.STATS, names.REPORTS, PROBES)
"""Folders in which killed writers may have left hidden things, beside those of the attempts."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which attempts may be garbage.

    Of epochs before ``epoch``: all that are not ``known``; of ``epoch`` itself: only those that have ``failed``; of later
    epochs: none. What these rules let go can never be committed. ``live`` are attempts in work. If it is ``urgent``,
    because the store is full, those need not be watched that a coordinator of this directory's log has begun. ``calm`` is
    for how long what predecessors had in work must be.
    """

    known: Container[str]
    live: frozenset[str]
    epoch: int
    failed: frozenset[str] = frozenset()
    urgent: bool = False
    calm: float = 0.0

    def admit(self, attempt: str) -> bool:
        """Whether the attempt is not needed by anybody who may still commit it."""
        if attempt in self.known or attempt in self.live:
            return False
        return names.attempt_epoch(attempt) < self.epoch or attempt in self.failed


@dataclass(frozen=True, slots=True)
class Leftover:
    """The folder, or the object, at ``path`` of ``store`` that nobody needs: ``nbytes`` in all, last touched at
    ``modified`` as the store says, which is for people. ``unlisted`` if no listing shows it.

    It can go if nobody touches it for another ``wait`` seconds.
    """

    store: Store
    path: str
    nbytes: int
    modified: float
    wait: float = 0.0
    unlisted: ObjectInfo | None = None


class Watch:
    """What one observer has seen in a directory, look after look, and who wrote to its log before.

    No clock is compared with another one: what somebody may still write is watched, by a monotonic clock, from when it is
    first seen. Who looks holds the ``lock`` meanwhile.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = elapsed) -> None:
        self.store = store
        self.predecessors = Predecessors(store)
        self.lock = threading.Lock()
        self._clock = clock
        self._asked = 0.0
        self._stillness = Stillness()
        self._met: set[str] = set()

    def look(self) -> None:
        """Another look begins: what the one before has not met is forgotten."""
        self.predecessors.look()
        self._stillness.forget_all_but(self._met)
        self._met = set()
        self._asked = self._clock()

    def missing(self, where: Store, path: str, infos: Iterable[ObjectInfo], seconds: float) -> float:
        """For how much longer what is at ``path`` must be as it is to have been so for ``seconds``."""
        key = f"{where.url}/{path}"
        self._met.add(key)
        seen = frozenset((info.path, info.size, info.modified) for info in infos)
        still = self._stillness.still_for(key, seen, asked=self._asked, answered=self._clock())
        return max(0.0, seconds - still)


class Predecessors:
    """The coordinators that wrote to a directory's log before the present one, and how far each had come."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._newest: dict[str, tuple[int, str]] | None = None

    def look(self) -> None:
        """Learn who they are, once: while the log still names them, for what is pruned may be the last word of one."""
        if self._newest is None:
            self._newest = self._read()

    def began(self, attempt: str) -> bool:
        """Whether one of them, or the present one, has begun this attempt: no copy from elsewhere has such a name."""
        return names.claim_of(attempt) in (self._newest or {})

    def left(self, attempt: str) -> bool:
        """Whether one of them has sealed this attempt and never committed it.

        Saves are committed in the order in which they begin, so what is younger than the last one of its coordinator
        never was a checkpoint. What people copy to where it was, from a backup say, has been one.
        """
        newest = (self._newest or {}).get(names.claim_of(attempt))
        return newest is not None and names.attempt_age(attempt) > newest

    def _read(self) -> dict[str, tuple[int, str]]:
        newest: dict[str, tuple[int, str]] = {}
        try:
            for seq in reversed(sequence_numbers(self._store)):
                claim = names.claim_of(read_commit_id(self._store, seq))
                if claim not in newest:  # this is its last entry
                    # What is in pages is older than the last active one.
                    known = read_entry(self._store, seq).state.known()
                    ages = [names.attempt_age(attempt) for attempt in known if names.claim_of(attempt) == claim]
                    newest[claim] = max(ages, default=(0, ""))
        except ObjectNotFoundError:
            pass  # pruned meanwhile, as all before it
        except DamagedError as error:
            logger.warning("what former coordinators have left is not collected: %s", error)
            return {}
        return newest


def other_folders(store: Store) -> Iterator[str]:
    """Every folder that is no attempt's, in which killed writers may have left hidden things."""
    yield from SWEPT
    yield from (names.group_folder(group) for group in group_names(store))


def attempt_folders(store: Store) -> Iterator[str]:
    """The folder of every attempt, whatever has come of it."""
    for folder in checkpoint_folders(store):
        for attempt in attempts(store, folder):
            yield f"{folder}/{attempt}"


def dead(folder: str, bounds: Bounds, min_age: float, watch: Watch) -> Leftover | None:
    """What is in the folder of an attempt, if it came to nothing; it may have to be watched for a while yet.

    What a predecessor had begun after all that it committed is safe to delete at once, whoever still writes to it: it never
    was a checkpoint and never will be. A rank whose file is gone has its save fail when its shards are looked at, before
    anything is sealed. What else has begun here has failed, or has been a checkpoint and is being copied back: if nobody
    does anything for a minute it goes, and if room is needed, ``urgent``, at once. What has not begun here may be a copy
    in the making, which is spared for ``min_age`` seconds. A whole checkpoint that was not left so by a predecessor is
    none: somebody copied it here.
    """
    attempt = folder.rpartition("/")[2]
    if not bounds.admit(attempt):
        return None
    # Where shards are apart, those of other directories may lie among them.
    store, began = watch.store, watch.predecessors.began(attempt)
    where = store if began else parts_of(store)[0]
    objects, unseen = list(objects_of_attempt(where, folder)), list(hidden(where, folder))
    if not objects and (where is not store or ("://" in store.url and not unseen)):
        return None  # servers may list a folder for a while, or for ever, of which nothing is left
    if any(info.path == f"{folder}/{names.MANIFEST}" for info in objects):
        if watch.predecessors.left(attempt):
            return leftover(where, folder, objects)
        logger.warning(
            "%s is not of this directory's log and is left alone; `distckpt adopt %s` adds it to the log",
            folder,
            store.url,
        )
        return None
    seconds = _patience(attempt, bounds, min_age, watch)
    return leftover(where, folder, objects, watch.missing(where, folder, [*objects, *unseen], seconds))


def _patience(attempt: str, bounds: Bounds, min_age: float, watch: Watch) -> float:
    """For how many seconds an attempt that is admitted, and not whole, must not have changed."""
    has_failed = attempt in bounds.failed
    if not has_failed and not watch.predecessors.began(attempt):
        return min_age
    if bounds.urgent:
        return 0.0
    is_left = watch.predecessors.left(attempt) and not has_failed
    return min(bounds.calm if is_left else FAILED_SECONDS, min_age)


def unfinished(folder: str, bounds: Bounds, min_age: float, watch: Watch) -> Iterator[Leftover]:
    """What no listing shows of a folder, each by itself: interrupted writes and uploads, some of which may yet go on.

    That of an attempt which came to nothing is watched for as long as the attempt. Some stores have all in one place.
    """
    for part in parts_of(watch.store):
        for info in hidden(part, folder):
            above = info.path.rpartition("/")[0]
            attempt = above.rpartition("/")[2]
            is_beside = above in SWEPT or above.startswith(f"{names.GROUPS}/")
            seconds = min(FAILED_SECONDS, min_age) if is_beside else min_age
            if names.is_attempt(attempt) and bounds.admit(attempt):
                seconds = _patience(attempt, bounds, min_age, watch)
            yield leftover(part, info.path, [info], watch.missing(part, info.path, [info], seconds), info)


def leftover(
    store: Store, path: str, objects: Collection[ObjectInfo], wait: float = 0.0, unlisted: ObjectInfo | None = None
) -> Leftover:
    """All of these objects as one, as old as the youngest of them."""
    modified = max((info.modified for info in objects), default=0.0)
    return Leftover(store, path, sum(info.size for info in objects), modified, wait, unlisted)


def old_probes(min_age: float, watch: Watch) -> list[Leftover]:
    """What processes have left that were testing the store, if they were killed."""
    return [
        leftover(part, info.path, [info], watch.missing(part, info.path, [info], min_age))
        for part in parts_of(watch.store)
        for info in at_most(MOST_NAMES, part.list(PROBES), f"{part.url}/{PROBES}")
    ]


def dropped_pages(bounds: Bounds, min_age: float, watch: Watch, dropped: Container[str] = ()) -> list[Leftover]:
    """Pages of older records that no entry in the log refers to and none ever will (``pages.old_pages``).

    None as long as an entry cannot be read: it may need any of them.
    """
    store = watch.store
    found = old_pages(store, bounds.epoch, dropped)
    if not found:
        return []
    try:
        referred = referred_pages(store)
    except DamagedError as error:
        logger.warning("no page of the log is collected: %s", error)
        return []
    seconds = 0.0 if bounds.urgent else min(FAILED_SECONDS, min_age)
    return [
        leftover(store, info.path, [info], watch.missing(store, info.path, [info], seconds))
        for info in found
        if names.page_id(info.path) not in referred
    ]


def hidden(store: Store, folder: str) -> Iterator[ObjectInfo]:
    """What no listing shows, where a store has such things."""
    return store.hidden(folder) if isinstance(store, SupportsHidden) else iter(())


def lost_reports(bounds: Bounds, min_age: float, watch: Watch) -> list[Leftover]:
    """Reports on what is no checkpoint any more."""
    store = watch.store
    return [
        leftover(store, info.path, [info], watch.missing(store, info.path, [info], min_age))
        for info in at_most(MOST_NAMES, store.list(names.REPORTS), f"{store.url}/{names.REPORTS}")
        if (attempt := names.reported_attempt(info.path)) is not None and bounds.admit(attempt)
    ]


def delete(left: Leftover) -> None:
    """Delete what can go. Of an attempt the manifest goes first; what no listing shows stays if it has changed."""
    if left.unlisted is not None:
        if isinstance(left.store, SupportsSweep):
            left.store.sweep([left.unlisted])
    elif names.is_attempt(left.path.rpartition("/")[2]):
        delete_attempt(left.store, left.path)
    else:
        left.store.delete(left.path)


def delete_attempt(store: Store, folder: str) -> None:
    """Delete all of an attempt, its manifest first, so that no part of it can be taken for a checkpoint."""
    store.delete(f"{folder}/{names.MANIFEST}")
    for info in list(objects_of_attempt(store, folder)):
        store.delete(info.path)


def is_replaced(store: Store, epoch: int) -> bool:
    """Whether the log shows a coordinator of a newer epoch, whose business garbage is from then on."""
    newest = max(sequence_numbers(store), default=0)
    try:
        return newest > 0 and read_entry(store, newest).epoch > epoch
    except ObjectNotFoundError:  # there is a newer one, whosever it is
        return True
    except DamagedError:  # it is no one's word
        return False
