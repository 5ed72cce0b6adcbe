"""What retention and clean-up do to a store. Deletes only what nothing committed refers to."""

from __future__ import annotations

import logging
import math
import time

from distckpt.coordinator.machine.actions import CollectGarbage, Deleted
from distckpt.directory.contents import attempts, checkpoint_folders, objects_of_attempt
from distckpt.directory.log import read_commit_id, read_entry, read_tail, sequence_numbers
from distckpt.errors import DamagedError, ObjectNotFoundError, StorageFullError, StoreUnsuitableError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import MOST_NAMES, PROBES, ObjectInfo, Store, SupportsSweep, at_most, probe

logger = logging.getLogger(__name__)

GARBAGE_AGE = 3600.0
"""Seconds for which nobody must have touched what earlier coordinators have left, for it to be deleted."""

FAILED_AGE = 60.0
"""Seconds until what a failed attempt has written is deleted, at most: it can never be committed, and takes room."""


def delete_checkpoints(store: Store, records: tuple[CheckpointRecord, ...]) -> Deleted:
    """Delete the objects of retired checkpoints, manifest first; what cannot be deleted now is left for later."""
    done = []
    for record in records:
        folder = names.attempt_folder(record.name, record.number, record.attempt)
        try:
            _delete_attempt(store, folder)
        except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
            logger.warning("%s could not be deleted and stays in the log as retiring: %s", folder, error)
        else:
            done.append(record.attempt)
    return Deleted(tuple(done))


def _delete_attempt(store: Store, folder: str) -> None:
    store.delete(f"{folder}/{names.MANIFEST}")
    for info in list(objects_of_attempt(store, folder)):
        store.delete(info.path)


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
                    known = read_entry(self._store, seq).state.known()
                    ages = [names.attempt_age(attempt) for attempt in known if names.claim_of(attempt) == claim]
                    newest[claim] = max(ages, default=(0, ""))
        except ObjectNotFoundError:
            pass  # pruned meanwhile, as all before it
        except DamagedError as error:
            logger.warning("what former coordinators have left is not collected: %s", error)
            return {}
        return newest


def collect_garbage(store: Store, action: CollectGarbage, min_age: float, predecessors: Predecessors) -> int:
    """Delete attempts that came to nothing and that nobody has touched for ``min_age`` seconds; returns how many.

    Those of earlier epochs that the log does not know, and those of this epoch that have failed, which need not be as
    old; those that a predecessor had finished but for the entry in the log go at once. Any other whole checkpoint is left
    alone: somebody copied it here. A coordinator that has been replaced deletes nothing.

    If it is urgent, what this coordinator or a predecessor has begun may be of any age: it can never be committed, whoever
    still writes to it. A rank whose file is gone has its save fail when its shards are looked at, before anything is
    sealed. What has not begun here may be a copy in the making.
    """
    gone = 0
    predecessors.look()
    if _is_replaced(store, action.epoch):
        return 0  # that is for a newer coordinator to do
    for folder in checkpoint_folders(store):
        for attempt in attempts(store, folder):
            gone += _sweep_folder(store, f"{folder}/{attempt}", min_age)
            if not _is_garbage(attempt, action):
                continue
            objects = list(objects_of_attempt(store, f"{folder}/{attempt}"))
            whole = any(info.path.endswith(f"/{names.MANIFEST}") for info in objects)
            if whole and not predecessors.left(attempt):
                logger.warning(
                    "%s/%s is not of this directory's log and is left alone; `distckpt adopt %s` adds it to the log",
                    folder,
                    attempt,
                    store.url,
                )
            elif whole or _untouched(objects, _least_age(attempt, action, predecessors, min_age)):
                gone += _collected(store, f"{folder}/{attempt}")
    return gone + _sweep(store, min_age)


def collect_unclaimed(store: Store, min_age: float, predecessors: Predecessors) -> int:
    """Delete what is garbage even though nobody here has claimed the directory; returns how much that was.

    That is what epochs before the newest have left and nobody has touched for ``min_age`` seconds. What the newest has
    in the making may still be committed, as its coordinator may live.
    """
    entry = read_tail(store).entry
    if entry is None:
        return 0
    action = CollectGarbage("", entry.state.known(), frozenset(), entry.epoch)
    return collect_garbage(store, action, min_age, predecessors)


def probe_with_room(store: Store, predecessors: Predecessors, min_age: float = GARBAGE_AGE) -> None:
    """Probe the store; if it is full, once more after garbage has been deleted. Raises what ``probe`` raises."""
    try:
        probe(store)
    except StoreUnsuitableError as error:
        if not isinstance(error.__cause__, StorageFullError) or not collect_unclaimed(store, min_age, predecessors):
            raise
        logger.warning("%s; it was full, and is usable since garbage has been deleted", store.url)
        probe(store)


def _is_replaced(store: Store, epoch: int) -> bool:
    newest = max(sequence_numbers(store), default=0)
    try:
        return newest > 0 and read_entry(store, newest).epoch > epoch
    except ObjectNotFoundError:  # there is a newer one, whosever it is
        return True
    except DamagedError:  # it is no one's word
        return False


def _least_age(attempt: str, action: CollectGarbage, predecessors: Predecessors, min_age: float) -> float:
    if action.urgent and (attempt in action.failed or predecessors.began(attempt)):
        return -math.inf  # whatever the clocks say
    return min(FAILED_AGE, min_age) if attempt in action.failed else min_age


def _collected(store: Store, folder: str) -> int:
    logger.info("collecting the unfinished attempt %s", folder)
    try:
        _delete_attempt(store, folder)
    except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
        logger.warning("the unfinished attempt %s could not be deleted: %s", folder, error)
        return 0
    return 1


def _untouched(objects: list[ObjectInfo], min_age: float) -> bool:
    return all(info.modified < time.time() - min_age for info in objects)


def _sweep(store: Store, min_age: float) -> int:
    """What killed processes left beside the attempts: probes, and temporary files."""
    probes = at_most(MOST_NAMES, store.list(PROBES), f"{store.url}/{PROBES}")
    old = [info for info in probes if info.modified < time.time() - min_age]
    for info in old:
        store.delete(info.path)
    return len(old) + sum(_sweep_folder(store, folder, min_age) for folder in ("", names.LOG, names.LEASES, PROBES))


def _sweep_folder(store: Store, folder: str, min_age: float) -> int:
    return store.sweep(folder, min_age) if isinstance(store, SupportsSweep) else 0


def _is_garbage(attempt: str, action: CollectGarbage) -> bool:
    if attempt in action.known or attempt in action.live:
        return False
    epoch = names.attempt_epoch(attempt)
    return epoch < action.epoch or attempt in action.failed
