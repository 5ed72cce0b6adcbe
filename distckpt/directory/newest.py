"""Which checkpoint is the newest, also when somebody has deleted by hand what the log names."""

from __future__ import annotations

import logging

from distckpt.directory.contents import is_there
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.strays import read_run
from distckpt.errors import DistckptError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import Store, join

logger = logging.getLogger(__name__)


def newest_committed(store: Store) -> CheckpointRecord | None:
    """The newest checkpoint of the log whose manifest is there; None if there is none. Says which newer ones are gone.

    LogMissingError if there are checkpoints and no log, DamagedError if no entry of the log can be read.
    """
    return newest_there(store, read_run(store))


def newest_there(store: Store, tail: Tail) -> CheckpointRecord | None:
    """As ``newest_committed``, for a log that has been read. Others are looked at only if its newest checkpoint is gone."""
    last = tail.head.active[-1:]
    if last and has_manifest(store, last[0]):
        return last[0]
    state = tail.state
    while True:
        found, missing = _search(store, state)
        if not missing:
            return found
        state = read_tail(store).state
        alive = state.alive()
        if all(record.attempt in alive for record in missing):  # not retired since the log was read
            _tell(store, found, missing)
            return found


def committed_after_all(store: Store, attempt: str) -> CheckpointRecord | None:
    """The record of an attempt whose commit was not answered, as storage is the truth; None if there is none, or nobody
    can tell."""
    try:
        return read_tail(store).having_attempt(attempt).find(attempt)
    except DistckptError as error:
        logger.warning("whether %s was committed cannot be found out: %s", attempt, error)
        return None


def has_manifest(store: Store, record: CheckpointRecord) -> bool:
    """Whether the manifest of a checkpoint is there, whatever is in it."""
    return is_there(store, f"{names.attempt_folder(record.name, record.number, record.attempt)}/{names.MANIFEST}")


def _search(store: Store, state: State) -> tuple[CheckpointRecord | None, list[CheckpointRecord]]:
    missing: list[CheckpointRecord] = []
    for record in state.newest_first():
        if has_manifest(store, record):
            return record, missing
        missing.append(record)
    return None, missing


def _tell(store: Store, found: CheckpointRecord | None, missing: list[CheckpointRecord]) -> None:
    gone = ", ".join(_path(store, record) for record in missing)
    if found is None:
        logger.error("%s: in the log, but deleted from storage, like all others: no checkpoint is left", gone)
    else:
        logger.warning("%s: in the log, but deleted from storage; %s is used instead", gone, _path(store, found))


def _path(store: Store, record: CheckpointRecord) -> str:
    return join(store.url, names.checkpoint_folder(record.name, record.number))
