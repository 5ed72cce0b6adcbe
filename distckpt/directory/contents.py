"""Which checkpoints, attempts and objects lie in a run's directory, found level by level and within bounds."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.format.limits import MAX_WORLD
from distckpt.storage import MOST_NAMES, ObjectInfo, Store, at_most

MOST_CHECKPOINTS = 1 << 22
"""More than anybody makes: one a minute for eight years."""

MOST_OBJECTS = 2 * MAX_WORLD


def checkpoint_folders(store: Store) -> list[str]:
    """Folders whose names are those of checkpoints, ``ckpt-42``."""
    found = (folder for folder in store.folders("") if names.parse_checkpoint(folder) is not None)
    return at_most(MOST_CHECKPOINTS, found, store.url)


def attempts(store: Store, folder: str) -> list[str]:
    """The attempts in a checkpoint's folder, or ('') in the root, as in a checkpoint that was copied alone."""
    found = (attempt for attempt in store.folders(folder) if names.is_attempt(attempt))
    return at_most(MOST_NAMES, found, f"{store.url}/{folder}")


def is_there(store: Store, path: str) -> bool:
    """Whether anything is at ``path``, an object or what somebody has put in its place."""
    try:
        return store.stat(path) is not None
    except DamagedError:
        return True


def objects_of_attempt(store: Store, folder: str) -> Iterator[ObjectInfo]:
    """Everything in an attempt's folder, exports included. What lies deeper than anything of ours is left out."""
    yield from at_most(MOST_OBJECTS, store.list(folder), f"{store.url}/{folder}")
    for export in exports_of_attempt(store, folder):
        yield from objects_of_export(store, f"{folder}/{export}")


def exports_of_attempt(store: Store, folder: str) -> list[str]:
    """Names of the export folders in an attempt's."""
    found = (export for export in store.folders(folder) if names.is_export(export))
    return at_most(MOST_NAMES, found, f"{store.url}/{folder}")


def objects_of_export(store: Store, folder: str) -> Iterator[ObjectInfo]:
    """Everything in an export's folder: a folder for each module, and files in those."""
    for module in at_most(MOST_NAMES, store.folders(folder), f"{store.url}/{folder}"):
        yield from at_most(MOST_NAMES, store.list(f"{folder}/{module}"), f"{store.url}/{folder}/{module}")
