"""What retention and clean-up do to a store. Deletes only what nothing committed refers to."""

from __future__ import annotations

import logging

from distckpt.coordinator.machine.actions import CollectGarbage, Deleted
from distckpt.directory.garbage import (
    SWEPT,
    Bounds,
    Predecessors,
    attempt_folders,
    dead,
    delete_attempt,
    is_replaced,
    old_probes,
)
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, SupportsSweep

logger = logging.getLogger(__name__)


def delete_checkpoints(store: Store, records: tuple[CheckpointRecord, ...]) -> Deleted:
    """Delete the objects of retired checkpoints, manifest first; what cannot be deleted now is left for later."""
    done = []
    for record in records:
        folder = names.attempt_folder(record.name, record.number, record.attempt)
        try:
            delete_attempt(store, folder)
        except Exception as error:  # noqa: BLE001 - one that cannot be deleted must not keep the others
            logger.warning("%s could not be deleted and stays in the log as retiring: %s", folder, error)
        else:
            done.append(record.attempt)
    return Deleted(tuple(done))


def collect_garbage(store: Store, action: CollectGarbage, min_age: float, predecessors: Predecessors) -> int:
    """Delete attempts that came to nothing, as ``garbage.dead`` judges them; returns how many things went.

    What killed processes left beside them goes too: probes, and what no listing shows. A coordinator that has been
    replaced deletes nothing.
    """
    predecessors.look()
    if is_replaced(store, action.epoch):
        return 0  # that is for a newer coordinator to do
    bounds = Bounds(action.known, action.live, action.epoch, action.failed, action.urgent)
    gone = 0
    for folder in attempt_folders(store):
        gone += _sweep(store, folder, min_age)
        found = dead(store, folder, bounds, min_age, predecessors)
        if found is not None:
            gone += _collected(found.store, found.path)
    probes = old_probes(store, min_age)
    for probe in probes:
        probe.store.delete(probe.path)
    return gone + len(probes) + sum(_sweep(store, folder, min_age) for folder in SWEPT)


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
