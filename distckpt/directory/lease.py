"""A reader's lease on storage: while it is held, retention does not delete what is being read."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator

from distckpt.directory.log import read_tail
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import FORMAT, Lease
from distckpt.format.json.sealed import seal
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""How long a lease counts that is not renewed. It is, four times as often, so clocks may differ by 90 seconds."""


@contextlib.contextmanager
def hold(store: Store, attempt: str, holder: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keep a committed checkpoint from being deleted for as long as the block runs.

    ``holder`` says who reads, for people. A reader that is killed leaves its lease behind, which counts until it is
    ``seconds`` old by the clock of whoever wants to delete. Raises CheckpointNotFoundError if the log does not list
    the attempt as active or preserved, StorageError if the lease cannot be written, ValueError if it would be too long.
    """
    path = names.lease_path(uuid.uuid4().hex)

    def renew() -> None:
        store.replace(path, seal(Lease(FORMAT, attempt, holder, time.time() + seconds)))

    try:
        renew()
        # In this order: retention first appends that it retires, then reads the leases. One of us sees the other.
        if attempt not in read_tail(store).having_attempt(attempt).alive():
            raise CheckpointNotFoundError(f"{store.url}: {attempt}", "it is not, or no longer, a committed checkpoint")
        with _repeating(renew, seconds / 4):
            yield
    finally:
        _release(store, path)


@contextlib.contextmanager
def _repeating(renew: Callable[[], None], seconds: float) -> Iterator[None]:
    def try_to_renew() -> None:
        try:
            renew()
        except Exception as error:  # noqa: BLE001 - what storage libraries raise untranslated may pass as well
            logger.warning("a lease could not be renewed, which is tried again in %g s: %s", seconds, error)

    coord = Coordinator()
    LooperThread.loop(coord, seconds, try_to_renew, name="distckpt-lease", skip_missed=True)
    try:
        yield
    finally:
        coord.request_stop()
        coord.join(ignore_live_threads=True)


def _release(store: Store, path: str) -> None:
    try:
        store.delete(path)
    except StorageError as error:
        logger.warning("the lease %s was left behind and will expire: %s", path, error)
