"""Pins: leases without an end, by which people keep a checkpoint, also from a job that runs."""

from __future__ import annotations

import contextlib
import logging

import msgspec

from distckpt.directory.log import read_tail
from distckpt.errors import CheckpointNotFoundError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import FORMAT, MAX_LEASE_BYTES, Lease
from distckpt.format.json.sealed import seal, unseal
from distckpt.storage import MOST_NAMES, Store, at_most

logger = logging.getLogger(__name__)


def pin(store: Store, attempt: str, holder: str, note: str, now: float) -> Lease:
    """Keep a committed checkpoint until somebody unpins it; what is pinned already keeps the pin that it has.

    On return it holds: whoever retires the checkpoint from now on sees the pin before anything is deleted, and takes it
    back. ``holder`` and ``note`` are for people, ``now`` is in epoch seconds. CheckpointNotFoundError if it came too late,
    StorageError if it could not be written: then there is none.
    """
    found = pin_of(store, attempt)
    if found is not None and found.holds and attempt in read_tail(store).having_attempt(attempt).alive():
        return found
    made = Lease(FORMAT, attempt, holder, None, since=now, note=note)
    try:
        store.replace(names.pin_path(attempt), seal(made))
        _check_alive(store, attempt)
        made = msgspec.structs.replace(made, holds=True)
        store.replace(names.pin_path(attempt), seal(made))
        _check_alive(store, attempt)  # somebody may have taken the first one away meanwhile
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete(names.pin_path(attempt))
        raise
    return made


def unpin(store: Store, attempt: str) -> bool:
    """Let go of a checkpoint; whether it was pinned so."""
    path = names.pin_path(attempt)
    there = store.stat(path) is not None
    store.delete(path)
    return there


def pins(store: Store) -> dict[str, Lease]:
    """Every pin, by the attempt that it keeps."""
    found = {}
    for info in at_most(MOST_NAMES, store.list(names.LEASES), f"{store.url}/{names.LEASES}"):
        attempt = names.pinned_attempt(info.path)
        lease = pin_of(store, attempt) if attempt is not None else None
        if attempt is not None and lease is not None:
            found[attempt] = lease
    return found


def pin_of(store: Store, attempt: str) -> Lease | None:
    """The pin of an attempt, None if it has none. One that cannot be read keeps it too: it is of nobody known."""
    path = names.pin_path(attempt)
    try:
        return unseal(store.read(path, MAX_LEASE_BYTES), Lease, path, MAX_LEASE_BYTES)
    except ObjectNotFoundError:
        return None
    except DamagedError as error:
        logger.warning("the pin %s cannot be read: %s", path, error.reason)
        return Lease(FORMAT, attempt, "", None)


def _check_alive(store: Store, attempt: str) -> None:
    if attempt not in read_tail(store).having_attempt(attempt).alive():
        raise CheckpointNotFoundError(
            f"{store.url}: {attempt}", "the pin came too late: it is not, or no longer, a committed checkpoint"
        )
