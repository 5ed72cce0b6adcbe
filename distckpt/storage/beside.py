"""A new folder of files, which is at its place whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from distckpt.errors import AlreadyExistsError, StorageError
from distckpt.storage.interface import Store
from distckpt.storage.location import canonical, open_store
from distckpt.storage.oserrors import writing
from distckpt.storage.paths import PathLike


@contextlib.contextmanager
def new_folder(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Iterator[Store]:
    """Inside, a store for the files of a folder, which is at ``path`` with all of them when this ends well.

    A local one is made beside it, as ``.<name>.<32 hex digits>.tmp``, and then given its name. In an object store, which
    has no folders, files have their names at once: write the one that tells of the others last. What an error leaves is
    removed; what a killed process leaves stays. AlreadyExistsError if anything is at ``path``: nothing is overwritten.
    """
    location = canonical(path)
    if "://" in location:
        with _in_place(location, storage_options) as store:
            yield store
        return
    above, name = os.path.split(location)
    if os.path.lexists(location):
        raise AlreadyExistsError(location)
    beside = os.path.join(above, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield open_store(beside, storage_options)
        with writing(location):
            if os.path.lexists(location):
                raise AlreadyExistsError(location)
            os.rename(beside, location)
            _sync(above)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _in_place(location: str, storage_options: Mapping[str, Any] | None) -> Iterator[Store]:
    store = open_store(location, storage_options)
    if next(store.list(""), None) is not None or next(store.folders(""), None) is not None:
        raise AlreadyExistsError(location, "something is there already; nothing was written")
    try:
        yield store
    except BaseException:
        with contextlib.suppress(StorageError):
            for info in list(store.list("")):
                store.delete(info.path)
        raise


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
