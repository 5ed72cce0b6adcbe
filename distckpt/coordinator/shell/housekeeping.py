"""What retention and clean-up do to a store. Deletes only what nothing committed refers to."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from distckpt.coordinator.machine.actions import CollectGarbage, Deleted
from distckpt.directory.contents import attempts, checkpoint_folders, objects_of_attempt
from distckpt.directory.log import read_entry, sequence_numbers
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import MOST_NAMES, PROBES, ObjectInfo, Store, SupportsSweep, at_most

logger = logging.getLogger(__name__)

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


def collect_garbage(store: Store, action: CollectGarbage, min_age: float) -> int:
    """Delete attempts that came to nothing and that nobody has touched for ``min_age`` seconds; returns how many.

    Those that are known to have failed need not be as old.

    Those of earlier epochs that the log does not know, and those of this epoch that have failed; what a later
    coordinator began is left alone, and so is a whole checkpoint that no coordinator in the log has written: somebody
    copied it here.
    """
    gone = 0
    claims = set(_claims(store))
    for folder in checkpoint_folders(store):
        for attempt in attempts(store, folder):
            gone += _sweep_folder(store, f"{folder}/{attempt}", min_age)
            if not _is_garbage(attempt, action):
                continue
            objects = list(objects_of_attempt(store, f"{folder}/{attempt}"))
            whole = any(info.path.endswith(f"/{names.MANIFEST}") for info in objects)
            if whole and names.claim_of(attempt) not in claims:
                logger.warning(
                    "%s/%s is not of this directory's log and is left alone; `distckpt adopt %s` adds it to the log",
                    folder,
                    attempt,
                    store.url,
                )
            elif _untouched(objects, min(FAILED_AGE, min_age) if attempt in action.failed else min_age):
                logger.info("collecting the unfinished attempt %s/%s", folder, attempt)
                _delete_attempt(store, f"{folder}/{attempt}")
                gone += 1
    return gone + _sweep(store, min_age)


def _untouched(objects: list[ObjectInfo], min_age: float) -> bool:
    return all(info.modified < time.time() - min_age for info in objects)


def _claims(store: Store) -> Iterator[str]:
    for seq in sequence_numbers(store):
        with contextlib.suppress(DamagedError, ObjectNotFoundError):  # whom it names is then spared, not deleted
            yield names.claim_of(read_entry(store, seq).commit_id)


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
