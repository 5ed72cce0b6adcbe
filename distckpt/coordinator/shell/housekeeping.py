"""What retention and clean-up do to a store. Deletes only what nothing committed refers to."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from distckpt.coordinator.machine.actions import CollectGarbage, Deleted
from distckpt.directory.garbage import (
    GARBAGE_SECONDS,
    LEFT_SECONDS,
    Bounds,
    Leftover,
    Watch,
    attempt_folders,
    dead,
    delete,
    delete_attempt,
    dropped_pages,
    is_replaced,
    lost_reports,
    old_probes,
    other_folders,
    unfinished,
)
from distckpt.directory.log import read_tail
from distckpt.directory.pages import known_of
from distckpt.errors import StorageFullError, StoreUnsuitableError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, probe

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


def collect_garbage(store: Store, action: CollectGarbage, min_age: float, watch: Watch) -> int:
    """Delete attempts that came to nothing, as ``garbage.dead`` judges them; returns how many things went.

    What killed processes left beside them goes too: probes, and what no listing shows. What must be watched first goes
    with a later call, if ``watch`` is the same. A coordinator that has been replaced deletes nothing.
    """
    with watch.lock:
        watch.look()
        if is_replaced(store, action.epoch):
            return 0  # that is for a newer coordinator to do
        known = known_of(store, action.known, action.pages)
        bounds = Bounds(known, action.live, action.epoch, action.failed, action.urgent, LEFT_SECONDS)
        gone = _collected(dropped_pages(bounds, min_age, watch, action.dropped))
        for folder in attempt_folders(store):
            found = dead(folder, bounds, min_age, watch)
            gone += _collected([found] if found is not None else [])
            gone += _collected(unfinished(folder, bounds, min_age, watch))
        for folder in other_folders(store):
            gone += _collected(unfinished(folder, bounds, min_age, watch))
        return gone + _collected([*old_probes(min_age, watch), *lost_reports(bounds, min_age, watch)])


def collect_unclaimed(store: Store, min_age: float, watch: Watch) -> int:
    """Delete what is garbage even though nobody here has claimed the directory; returns how much that was.

    That is what epochs before the newest have left. What the newest has in the making may still be committed, as its
    coordinator may live.
    """
    entry = read_tail(store).entry
    if entry is None:
        return 0
    state = entry.state
    action = CollectGarbage("", state.known(), frozenset(), entry.epoch, urgent=True, pages=state.pages)
    return collect_garbage(store, action, min_age, watch)


def probe_with_room(store: Store, watch: Watch, min_age: float = GARBAGE_SECONDS) -> None:
    """Probe the store; if it is full, once more after garbage has been deleted. Raises what ``probe`` raises."""
    try:
        probe(store)
    except StoreUnsuitableError as error:
        if not isinstance(error.__cause__, StorageFullError) or not collect_unclaimed(store, min_age, watch):
            raise
        logger.warning("%s; it was full, and is usable since garbage has been deleted", store.url)
        probe(store)


def _collected(found: Iterable[Leftover]) -> int:
    gone = 0
    for left in found:
        if left.wait > 0:
            continue
        try:
            delete(left)
        except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
            logger.warning("%s, which came to nothing, could not be deleted: %s", left.path, error)
        else:
            logger.info("%s came to nothing and is deleted", left.path)
            gone += 1
    return gone
