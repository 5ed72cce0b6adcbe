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
    return made_to_hold(store, names.pin_path(attempt), made, "pin")


def made_to_hold(store: Store, path: str, made: Lease, what: str) -> Lease:
    """Write a lease without an end, and return it once it holds; ``what`` it is, to people.

    CheckpointNotFoundError if it came too late, StorageError if it could not be written: then there is none.
    """
    try:
        store.replace(path, seal(made))
        _check_alive(store, made.attempt, what)
        made = msgspec.structs.replace(made, holds=True)
        store.replace(path, seal(made))
        _check_alive(store, made.attempt, what)  # somebody may have taken the first one away meanwhile
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete(path)
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
    return read_endless(store, names.pin_path(attempt), attempt)


def read_endless(store: Store, path: str, attempt: str = "") -> Lease | None:
    """The lease without an end at ``path``, None if there is none. One that cannot be read is of ``attempt`` and nobody."""
    try:
        return unseal(store.read(path, MAX_LEASE_BYTES), Lease, path, MAX_LEASE_BYTES)
    except ObjectNotFoundError:
        return None
    except DamagedError as error:
        logger.warning("%s cannot be read: %s", path, error.reason)
        return Lease(FORMAT, attempt, "", None)


def _check_alive(store: Store, attempt: str, what: str) -> None:
    if attempt not in read_tail(store).having_attempt(attempt).alive():
        raise CheckpointNotFoundError(
            f"{store.url}: {attempt}", f"the {what} came too late: it is not, or no longer, a committed checkpoint"
        )
