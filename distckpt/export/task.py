"""Making one export, in a process that does not train: from a committed checkpoint to a committed export."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from distckpt.directory.contents import exports_of_attempt, objects_of_export
from distckpt.directory.exports import read_export
from distckpt.directory.lease import hold
from distckpt.directory.locate import located
from distckpt.directory.log import read_tail
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.export.contents import contents
from distckpt.export.recipes import Recipe
from distckpt.format import names
from distckpt.format.json.export import FORMAT, ExportedFile, ExportedModule, ExportManifest
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.sealed import seal
from distckpt.reader import CheckpointReader
from distckpt.storage import Store, open_store, put_file, scratch_folder

logger = logging.getLogger(__name__)

NICENESS = 10


@dataclass(frozen=True, slots=True)
class Order:
    """What to export from where. Travels to the process that does it."""

    directory: str
    storage_options: Mapping[str, Any] | None = field(repr=False)
    record: CheckpointRecord
    recipes: tuple[Recipe, ...] = field(repr=False)


class Outcome(msgspec.Struct, frozen=True):
    """What became of an order. ``text`` is the export's path, or the reason; ``module`` is the one that failed."""

    kind: Literal["exported", "exists", "gone", "failed"]
    text: str
    module: str = ""
    trace: str = ""


def carry_out_aside(order: Order) -> Outcome:
    """As ``carry_out``, for a process that does nothing else: it leaves the CPUs to training, and stays that way."""
    os.nice(max(0, NICENESS - os.nice(0)))
    return carry_out(order)


def carry_out(order: Order) -> Outcome:
    """Make the export and commit it. Raises nothing: what went wrong is in the outcome, and leaves no export behind."""
    record = order.record
    folder = names.attempt_folder(record.name, record.number, record.attempt)
    work: _Work | None = None
    try:
        store = open_store(order.directory, order.storage_options)
        _check_shared(store)
        with hold(store, record.attempt, f"the export of {folder} by process {os.getpid()} on {socket.gethostname()}"):
            if read_export(store, folder) is not None:
                return Outcome("exists", f"{store.url}/{folder}")
            work = _Work(store, record, folder, uuid.uuid4().hex)
            return work.run(order.recipes)
    except CheckpointNotFoundError as error:
        return Outcome("gone", str(error))
    except Exception as error:  # noqa: BLE001 - it is told to the manager, which logs and raises it
        reason = f"{type(error).__name__}: {error}"
        return Outcome("failed", reason, work.module if work is not None else "", traceback.format_exc())


def _check_shared(store: Store) -> None:
    if read_tail(store).entry is None:
        raise StorageError(
            store.url,
            f"no checkpoint is to be seen from {socket.gethostname()}, where the export is made. "
            "Use a directory that all hosts share",
        )


class _Work:
    """One export in the making. Its id is unique for ever, so what is left of it never mixes with another."""

    def __init__(self, store: Store, record: CheckpointRecord, folder: str, export: str) -> None:
        self._store = store
        self._record = record
        self._folder = folder
        self._export = export
        self.module = ""
        """Which is being made just now."""

    def run(self, recipes: tuple[Recipe, ...]) -> Outcome:
        """Make every file, then commit. CheckpointNotFoundError if the checkpoint was retired meanwhile."""
        try:
            with CheckpointReader(located(self._store, self._record)) as reader:
                modules = tuple(self._module(reader, recipe) for recipe in recipes)
            self.module = ""
            manifest = ExportManifest(FORMAT, self._export, self._record.attempt, time.time(), modules)
            data = seal(manifest)
            self._check_committed()
        except Exception:
            self._discard(lambda folder: folder == names.export_folder(self._export))
            self._check_committed()
            raise
        return self._commit(manifest, data)

    def _commit(self, manifest: ExportManifest, data: bytes) -> Outcome:
        try:
            self._store.put_if_absent(f"{self._folder}/{names.EXPORT}", data)
        except StorageError as error:
            # It may be there all the same, or come to be there: so the files stay where they are.
            found = read_export(self._store, self._folder)
            if found is None:
                raise
            if found.id != manifest.id:
                self._discard(lambda folder: folder == manifest.folder)
                return Outcome("exists", f"{self._store.url}/{self._folder}")
            logger.info("the export was committed all the same: %s", error)
        self._discard(lambda folder: folder != manifest.folder)
        return Outcome("exported", f"{self._store.url}/{self._folder}/{manifest.folder}")

    def _check_committed(self) -> None:
        attempt = self._record.attempt
        if attempt not in read_tail(self._store).having_attempt(attempt).alive():
            raise CheckpointNotFoundError(self._folder, "it was retired while it was being exported")

    def _discard(self, unwanted: Callable[[str], bool]) -> None:
        """Delete exports of this attempt that came to nothing and cannot be committed any more."""
        try:
            for export in exports_of_attempt(self._store, self._folder):
                if unwanted(export):
                    for info in list(objects_of_export(self._store, f"{self._folder}/{export}")):
                        self._store.delete(info.path)
        except StorageError as error:
            logger.warning("leftovers of an export stay until their checkpoint is deleted: %s", error)

    def _module(self, reader: CheckpointReader, recipe: Recipe) -> ExportedModule:
        self.module = recipe.name
        put = functools.partial(self._put, recipe.name)
        return ExportedModule(recipe.name, tuple(put(name, write) for name, write in contents(reader, recipe)))

    def _put(self, module: str, name: str, write: Callable[[str], object]) -> ExportedFile:
        with scratch_folder() as scratch:
            local = os.path.join(scratch, name)
            write(local)
            path = f"{self._folder}/{names.export_folder(self._export)}/{module}/{name}"
            return ExportedFile(name, *put_file(self._store, path, local))
