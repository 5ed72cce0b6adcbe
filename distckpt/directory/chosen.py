"""Checkpoints of a log by the paths that people write, for what changes how they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.directory.contents import attempts
from distckpt.directory.locate import foreign_advice
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.newest import newest_there
from distckpt.directory.pages import known
from distckpt.directory.strays import read_run
from distckpt.directory.tags import tagged
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, above, join, open_store, split_path


@dataclass(frozen=True, slots=True)
class Chosen:
    """The attempts that the log has under one name and number, the one that counts first. ``tail`` is the log."""

    store: Store
    tail: Tail
    records: tuple[CheckpointRecord, ...]

    @property
    def folder(self) -> str:
        """``ckpt-42``."""
        return names.checkpoint_folder(self.records[0].name, self.records[0].number)

    @property
    def path(self) -> str:
        """What people call it."""
        return join(self.store.url, self.folder)


def choose(path: str, storage_options: Mapping[str, Any] | None = None) -> Chosen:
    """The committed checkpoint at ``path``, or the newest of the directory at ``path``.

    CheckpointNotFoundError if there is none in a log: a folder that was copied alone is nobody's to keep or to delete.
    LogMissingError if the log of its directory is gone.
    """
    store = open_store(path, storage_options)
    tail = read_run(store)
    if tail.entry is not None:
        newest = newest_there(store, tail) or tail.newest()
        if newest is None:
            raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
        return _chosen(store, tail, names.checkpoint_folder(newest.name, newest.number))
    directory, folder = split_path(store.url)
    return choose_in(open_store(directory, storage_options), folder)


def refuse_inside(store: Store, storage_options: Mapping[str, Any] | None = None) -> None:
    """ValueError if the store is at a checkpoint of a run, whose directory is the one above: nothing will ever come there."""
    around = _run_around(store, storage_options)
    if around:
        raise ValueError(f"{store.url} is a checkpoint of a run. To follow the run, give its directory: {around}")


def refuse_checkpoint(store: Store, storage_options: Mapping[str, Any] | None = None) -> None:
    """ValueError if the store is at a checkpoint of a run: a log there would hide it, and what is read there be another."""
    try:
        around = _run_around(store, storage_options)
    except StorageError:  # nobody need be able to read what is around a directory
        return
    if around and attempts(store, ""):
        raise ValueError(
            f"{store.url} is a checkpoint of a run, which another log there would hide. To go on with the run, give its "
            f"directory, {around}; to begin another with it, give another directory, and restore it: "
            f"checkpoint.restore({store.url!r})"
        )


def _run_around(store: Store, storage_options: Mapping[str, Any] | None) -> str:
    """The directory above, if that is a run's and the store is at a name that a checkpoint may have; else ''."""
    directory, folder = above(store.url) or ("", "")
    if names.parse_checkpoint(folder) is None:
        return ""
    return directory if read_tail(open_store(directory, storage_options)).entry is not None else ""


def choose_in(store: Store, folder: str) -> Chosen:
    """The committed checkpoint of that name, or that tag, in a directory. Raises as ``choose``."""
    tail = read_run(store)
    record = tagged(store, folder) if tail.entry is not None else None
    if record is not None:
        return Chosen(store, tail, (record,))
    if tail.entry is None or names.parse_checkpoint(folder) is None:
        raise CheckpointNotFoundError(
            join(store.url, folder), "neither a directory with committed checkpoints nor one of its checkpoints"
        )
    return _chosen(store, tail, folder)


def _chosen(store: Store, tail: Tail, folder: str) -> Chosen:
    _, number = names.parse_checkpoint(folder) or ("", -1)
    state = tail.having_numbers(number)
    found = [record for record in state.newest_first() if names.checkpoint_folder(record.name, record.number) == folder]
    if not found:
        advice = foreign_advice(store, folder, known(store, tail.head))
        path = join(store.url, folder)
        raise CheckpointNotFoundError(path, f"not a committed checkpoint of {store.url}{advice}")
    return Chosen(store, tail, tuple(found))
