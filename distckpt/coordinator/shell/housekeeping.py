"""What retention and clean-up do to a store. Deletes only what nothing committed refers to."""

from __future__ import annotations

import logging

from distckpt.coordinator.machine.actions import CollectGarbage, Deleted
from distckpt.directory.garbage import (
    GARBAGE_SECONDS,
    SWEPT,
    Bounds,
    Predecessors,
    attempt_folders,
    dead,
    delete_attempt,
    dropped_pages,
    is_replaced,
    lost_reports,
    old_probes,
)
from distckpt.directory.log import read_tail
from distckpt.directory.pages import known_of
from distckpt.errors import StorageFullError, StoreUnsuitableError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, SupportsSweep, probe

logger = logging.getLogger(__name__)


def delete_checkpoints(store: Store, records: tuple[CheckpointRecord, ...], reports: tuple[str, ...] = ()) -> Deleted:
    """Delete the objects of retired checkpoints, manifest first, and what was reported on them.

    What cannot be deleted now is left for later.
    """
    done = []
    for record in records:
        folder = names.attempt_folder(record.name, record.number, record.attempt)
        try:
            delete_attempt(store, folder)
        except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
            logger.warning("%s could not be deleted and stays in the log as retiring: %s", folder, error)
        else:
            done.append(record.attempt)
    for path in reports:
        if names.reported_attempt(path) in done:
            _delete_report(store, path)
    return Deleted(tuple(done))


def _delete_report(store: Store, path: str) -> None:
    try:
        store.delete(path)
    except Exception as error:  # noqa: BLE001 - it is of nothing by now, and garbage
        logger.warning("the report %s is left to the next coordinator: %s", path, error)


def collect_garbage(store: Store, action: CollectGarbage, min_age: float, predecessors: Predecessors) -> int:
    """Delete attempts that came to nothing, as ``garbage.dead`` judges them; returns how many things went.

    What killed processes left beside them goes too: probes, and what no listing shows. A coordinator that has been
    replaced deletes nothing.
    """
    predecessors.look()
    if is_replaced(store, action.epoch):
        return 0  # that is for a newer coordinator to do
    bounds = Bounds(
        known_of(store, action.known, action.pages), action.live, action.epoch, action.failed, action.urgent
    )
    gone = _collect_pages(store, action)
    for folder in attempt_folders(store):
        gone += _sweep(store, folder, min_age)
        found = dead(store, folder, bounds, min_age, predecessors)
        if found is not None:
            gone += _collected(found.store, found.path)
    probes = old_probes(store, min_age)
    reports = lost_reports(store, bounds, min_age)
    for left in (*probes, *reports):
        left.store.delete(left.path)
    return gone + len(probes) + len(reports) + sum(_sweep(store, folder, min_age) for folder in SWEPT)


def collect_unclaimed(store: Store, min_age: float, predecessors: Predecessors) -> int:
    """Delete what is garbage even though nobody here has claimed the directory; returns how much that was.

    That is what epochs before the newest have left and nobody has touched for ``min_age`` seconds. What the newest has
    in the making may still be committed, as its coordinator may live.
    """
    entry = read_tail(store).entry
    if entry is None:
        return 0
    action = CollectGarbage("", entry.state.known(), frozenset(), entry.epoch, pages=entry.state.pages)
    return collect_garbage(store, action, min_age, predecessors)


def probe_with_room(store: Store, predecessors: Predecessors, min_age: float = GARBAGE_SECONDS) -> None:
    """Probe the store; if it is full, once more after garbage has been deleted. Raises what ``probe`` raises."""
    try:
        probe(store)
    except StoreUnsuitableError as error:
        if not isinstance(error.__cause__, StorageFullError) or not collect_unclaimed(store, min_age, predecessors):
            raise
        logger.warning("%s; it was full, and is usable since garbage has been deleted", store.url)
        probe(store)


def _collect_pages(store: Store, action: CollectGarbage) -> int:
    pages = dropped_pages(store, action.epoch, action.dropped)
    for info in pages:
        store.delete(info.path)
    return len(pages)


def _collected(store: Store, folder: str) -> int:
    logger.info("collecting the unfinished attempt %s", folder)
    try:
        delete_attempt(store, folder)
    except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
        logger.warning("the unfinished attempt %s could not be deleted: %s", folder, error)
        return 0
    return 1


def _sweep(store: Store, folder: str, min_age: float) -> int:
    return store.sweep(folder, min_age) if isinstance(store, SupportsSweep) else 0
