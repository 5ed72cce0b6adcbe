"""What dead writers have left in a directory, and how it is deleted: one judge, for the coordinator and for people."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass

from distckpt.directory.contents import attempts, checkpoint_folders, objects_of_attempt
from distckpt.directory.log import read_commit_id, read_entry, referred_pages, sequence_numbers
from distckpt.directory.pages import old_pages
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.storage import MOST_NAMES, PROBES, ObjectInfo, Store, at_most, parts_of

logger = logging.getLogger(__name__)

GARBAGE_SECONDS = 3600.0
"""How long nobody has touched what is taken for dead. That spares copies which somebody is just making."""

FAILED_SECONDS = 60.0
"""The same for an attempt of which it is known that it has failed: it can never be committed, and takes room."""

SWEPT = ("", names.LOG, names.PAGES, names.LEASES, names.REPORTS, PROBES)
"""Folders in which killed writers may have left hidden things, beside those of the attempts."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which attempts may be garbage.

    Of epochs before ``epoch``: all that are not ``known``; of ``epoch`` itself: only those that have ``failed``; of later
    epochs: none. What these rules let go can never be committed. ``live`` are attempts in work. If it is ``urgent``,
    because the store is full, those need not be old that a coordinator of this directory's log has begun.
    """

    known: Container[str]
    live: frozenset[str]
    epoch: int
    failed: frozenset[str] = frozenset()
    urgent: bool = False

    def admit(self, attempt: str) -> bool:
        """Whether the attempt is not needed by anybody who may still commit it."""
        if attempt in self.known or attempt in self.live:
            return False
        return names.attempt_epoch(attempt) < self.epoch or attempt in self.failed


@dataclass(frozen=True, slots=True)
class Leftover:
    """The folder, or the object, at ``path`` of ``store`` that nobody needs: ``nbytes`` in all, last touched at
    ``modified``."""

    store: Store
    path: str
    nbytes: int
    modified: float


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


def attempt_folders(store: Store) -> Iterator[str]:
    """The folder of every attempt, whatever has come of it."""
    for folder in checkpoint_folders(store):
        for attempt in attempts(store, folder):
            yield f"{folder}/{attempt}"


def dead(store: Store, folder: str, bounds: Bounds, min_age: float, predecessors: Predecessors) -> Leftover | None:
    """What is in the folder of an attempt, if it came to nothing and nobody has touched it for ``min_age`` seconds.

    Those that have failed need not be as old; those that a predecessor had finished but for the entry in the log may be of
    any age. Any other whole checkpoint is none: somebody copied it here.

    If it is urgent, what this coordinator or a predecessor has begun may be of any age: it can never be committed, whoever
    still writes to it. A rank whose file is gone has its save fail when its shards are looked at, before anything is
    sealed. What has not begun here may be a copy in the making. ``predecessors`` have been looked at.
    """
    attempt = folder.rpartition("/")[2]
    if not bounds.admit(attempt):
        return None
    # Where shards are apart, those of other directories may lie among them.
    where = store if predecessors.began(attempt) else parts_of(store)[0]
    objects = list(objects_of_attempt(where, folder))
    if not objects and where is not store:
        return None
    whole = any(info.path == f"{folder}/{names.MANIFEST}" for info in objects)
    if whole and not predecessors.left(attempt):
        logger.warning(
            "%s is not of this directory's log and is left alone; `distckpt adopt %s` adds it to the log",
            folder,
            store.url,
        )
        return None
    if not whole and not _untouched(objects, _least_age(attempt, bounds, predecessors, min_age)):
        return None
    return leftover(where, folder, objects)


def leftover(store: Store, path: str, objects: list[ObjectInfo]) -> Leftover:
    """All of these objects as one, as old as the youngest of them."""
    modified = max((info.modified for info in objects), default=0.0)
    return Leftover(store, path, sum(info.size for info in objects), modified)


def old_probes(store: Store, min_age: float) -> list[Leftover]:
    """What killed processes have left that were testing the store."""
    return [
        leftover(part, info.path, [info])
        for part in parts_of(store)
        for info in at_most(MOST_NAMES, part.list(PROBES), f"{part.url}/{PROBES}")
        if info.modified < time.time() - min_age
    ]


def dropped_pages(store: Store, epoch: int, dropped: Container[str] = ()) -> list[ObjectInfo]:
    """Pages of older records that no entry in the log refers to and none ever will (``pages.old_pages``).

    None as long as an entry cannot be read: it may need any of them.
    """
    found = old_pages(store, epoch, dropped)
    if not found:
        return []
    try:
        referred = referred_pages(store)
    except DamagedError as error:
        logger.warning("no page of the log is collected: %s", error)
        return []
    return [info for info in found if names.page_id(info.path) not in referred]


def lost_reports(store: Store, bounds: Bounds, min_age: float) -> list[Leftover]:
    """Reports on what is no checkpoint any more."""
    return [
        leftover(store, info.path, [info])
        for info in at_most(MOST_NAMES, store.list(names.REPORTS), f"{store.url}/{names.REPORTS}")
        if (attempt := names.reported_attempt(info.path)) is not None
        and bounds.admit(attempt)
        and info.modified < time.time() - min_age
    ]


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


def _least_age(attempt: str, bounds: Bounds, predecessors: Predecessors, min_age: float) -> float:
    if bounds.urgent and (attempt in bounds.failed or predecessors.began(attempt)):
        return -math.inf  # whatever the clocks say
    return min(FAILED_SECONDS, min_age) if attempt in bounds.failed else min_age


def _untouched(objects: list[ObjectInfo], min_age: float) -> bool:
    return all(info.modified < time.time() - min_age for info in objects)
