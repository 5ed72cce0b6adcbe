"""Exports of bare checkpoints, as far as those that look for them can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distckpt.format import names
from distckpt.format.json.export import ExportedFile, ExportedModule, ExportManifest
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store
from tests.support.checkpoints import commit, new_attempt, put_manifest
from tests.support.sealed import plain, resealed


def exported(
    store: Store, number: int, name: str = "ckpt", change: Callable[[ExportManifest], Any] = lambda manifest: manifest
) -> str:
    """Commit a bare checkpoint and the description of an export of it; the export's path."""
    record = put_manifest(store, number, new_attempt(), name=name)
    commit(store, record)
    return describe_export(store, record, change)


def describe_export(
    store: Store, record: CheckpointRecord, change: Callable[[ExportManifest], Any] = lambda manifest: manifest
) -> str:
    """The path of an export of that checkpoint, of which there is the description."""
    folder = names.attempt_folder(record.name, record.number, record.attempt)
    files = (ExportedFile(names.WEIGHTS, 1, 2),)
    manifest = ExportManifest(1, new_attempt()[-32:], record.attempt, 3.0, (ExportedModule("tower", files),))
    store.put_if_absent(f"{folder}/{names.EXPORT}", resealed(plain(change(manifest))))
    return f"{store.url}/{folder}/{manifest.folder}"
