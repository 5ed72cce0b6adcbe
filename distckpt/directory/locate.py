"""From a path that a person writes to the one attempt that it means, with manifest and index read and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import crc32c

from distckpt.directory.contents import attempts, is_there
from distckpt.directory.log import read_tail
from distckpt.directory.newest import newest_there
from distckpt.directory.pages import known
from distckpt.directory.strays import read_run, strays_in
from distckpt.directory.tags import tagged
from distckpt.errors import CheckpointNotFoundError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.arrow.index import Index, decode_index
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.manifest import MAX_MANIFEST_BYTES, Manifest
from distckpt.format.json.sealed import unseal
from distckpt.storage import PathLike, Store, above, cool, open_store, parts_of, twice
from distckpt.transfer.checksums import stored_size_and_crc

LARGE_INDEX = 64 << 20
WRONG_INDEX = "size or CRC32C is not what the manifest says"


@dataclass(frozen=True, slots=True)
class Located:
    """One committed attempt: ``folder`` is relative to the root of ``store``; ``path`` is what people call it."""

    store: Store
    folder: str
    path: str
    manifest: Manifest

    @property
    def is_lone(self) -> bool:
        """Whether it is a copy without its directory's log, so that nobody retires it."""
        return "/" not in self.folder

    def object_path(self, name: str) -> str:
        """An object of the attempt, relative to the store's root."""
        return f"{self.folder}/{name}"

    def shard_path(self, rank: int, shard: int) -> str:
        """A shard of the attempt, relative to the store's root."""
        return self.object_path(names.shard_name(rank, shard))


def locate(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Located:
    """The checkpoint that ``path`` means: ``<directory>/<name>-<number>``, or with a tag for the last part; a directory (its
    newest), or a lone copy.

    A lone copy is a checkpoint folder without its directory's log. The newest is the newest of which there is a
    manifest: what was deleted by hand is passed over with a warning. Raises CheckpointNotFoundError when nothing
    committed answers to the path, LogMissingError for a directory that has checkpoints but no log, DamagedError when
    the manifest is not what was written.
    """
    store = open_store(path, storage_options)
    tail = read_tail(store)
    if tail.entry is not None:
        newest = newest_there(store, tail) or tail.newest()
        if newest is None:
            raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
        return located(store, newest)
    found = _in_directory(store, storage_options) or _lone_copy(store) or _by_tag(store, storage_options)
    if found is None:
        read_run(store)
        raise CheckpointNotFoundError(store.url, "neither a directory with committed checkpoints nor a checkpoint")
    return found


def _in_directory(store: Store, storage_options: Mapping[str, Any] | None) -> Located | None:
    """The checkpoint whose folder is the root of ``store``, by the log beside it; None if there is no such log."""
    directory, folder = above(store.url) or ("", "")
    checkpoint = names.parse_checkpoint(folder)
    if checkpoint is None:
        return None
    parent = open_store(directory, storage_options)
    tail = read_tail(parent)
    if tail.entry is None:
        return None
    for record in tail.having_numbers(checkpoint[1]).newest_first():
        if (record.name, record.number) == checkpoint:
            return located(parent, record)
    advice = foreign_advice(parent, folder, known(parent, tail.head))
    raise CheckpointNotFoundError(store.url, f"not a committed checkpoint of {parent.url}{advice}")


def foreign_advice(store: Store, folder: str, known: Container[str]) -> str:
    """What to do about a folder that looks whole but is not in the log; '' if there is none."""
    if next(strays_in(store, folder, known), None) is None:
        return ""
    return f". If it was copied here, run `distckpt adopt {store.url}`, which checks it and adds it to the log"


def located(store: Store, record: CheckpointRecord) -> Located:
    """The attempt of a record of this directory, its manifest checked against the log."""
    return twice(lambda: _located(store, record))


def _located(store: Store, record: CheckpointRecord) -> Located:
    folder = names.attempt_folder(record.name, record.number, record.attempt)
    path = f"{store.url}/{names.checkpoint_folder(record.name, record.number)}"
    data = _read(store, f"{folder}/{names.MANIFEST}", MAX_MANIFEST_BYTES)
    if len(data) != record.manifest_size or crc32c.crc32c(data) != record.manifest_crc32c:
        raise DamagedError(f"{store.url}/{folder}/{names.MANIFEST}", "size or CRC32C is not what the log says")
    manifest = _manifest(store, folder, data)
    if (manifest.name, manifest.number, manifest.attempt) != (record.name, record.number, record.attempt):
        raise DamagedError(f"{store.url}/{folder}/{names.MANIFEST}", "it is the manifest of another checkpoint")
    return Located(store, folder, path, manifest)


def read_index(where: Located) -> Index:
    """The checkpoint's index, checked against its manifest."""
    return twice(lambda: _index(where), lambda: cool(where.store, where.object_path(names.INDEX)))


def _index(where: Located) -> Index:
    path, manifest = where.object_path(names.INDEX), where.manifest
    shown = f"{where.store.url}/{path}"
    told = manifest.index_size, manifest.index_crc32c
    # A large one is looked at piece by piece before there is memory for all of it.
    if manifest.index_size > LARGE_INDEX and _size_and_crc(where.store, path) != told:
        raise DamagedError(shown, WRONG_INDEX)
    data = _read(where.store, path, manifest.index_size)
    if (len(data), crc32c.crc32c(data)) != told:
        raise DamagedError(shown, WRONG_INDEX)
    sizes = {(shard.rank, shard.shard): shard.size for shard in where.manifest.shards}
    return decode_index(data, shown, sizes)


def read_manifest(store: Store, folder: str) -> Manifest:
    """The manifest of an attempt, known to be whole by its own checksum."""
    return _read_manifest(store, folder)[0]


def read_sealed(store: Store, folder: str) -> tuple[Manifest, CheckpointRecord]:
    """The manifest of an attempt, and the record that a log entry has of it. DamagedError if it is not whole."""
    manifest, data = _read_manifest(store, folder)
    record = CheckpointRecord(
        name=manifest.name,
        number=manifest.number,
        attempt=manifest.attempt,
        manifest_size=len(data),
        manifest_crc32c=crc32c.crc32c(data),
        time=manifest.time,
        world_size=manifest.world_size,
        nbytes=sum(shard.size for shard in manifest.shards),
    )
    return manifest, record


def _read_manifest(store: Store, folder: str) -> tuple[Manifest, bytes]:
    def read() -> tuple[Manifest, bytes]:
        data = _read(store, f"{folder}/{names.MANIFEST}", MAX_MANIFEST_BYTES)
        return _manifest(store, folder, data), data

    return twice(read)


def _manifest(store: Store, folder: str, data: bytes) -> Manifest:
    return unseal(data, Manifest, f"{store.url}/{folder}/{names.MANIFEST}", MAX_MANIFEST_BYTES)


def _read(store: Store, path: str, max_bytes: int) -> bytes:
    with _there(store, path):
        return store.read(path, max_bytes)


def _size_and_crc(store: Store, path: str) -> tuple[int, int]:
    with _there(store, path):
        return stored_size_and_crc(store, path)


@contextlib.contextmanager
def _there(store: Store, path: str) -> Iterator[None]:
    try:
        yield
    except ObjectNotFoundError as error:
        raise DamagedError(f"{store.url}/{path}", "missing: it was deleted, or retired while it was read") from error


def _own_manifest(store: Store, attempt: str) -> Manifest:
    manifest = read_manifest(store, attempt)
    if manifest.attempt != attempt:
        raise DamagedError(f"{store.url}/{attempt}/{names.MANIFEST}", "it is the manifest of another attempt")
    return manifest


def _by_tag(store: Store, storage_options: Mapping[str, Any] | None) -> Located | None:
    """The checkpoint whose tag is the last part of the path, in the directory above; None if there is no such tag."""
    directory, name = above(store.url) or ("", "")
    if not names.is_tag(name):
        return None
    parent = open_store(directory, storage_options)
    try:
        record = tagged(parent, name)
    except StorageError:  # who may not look above has no tag there
        return None
    return None if record is None else located(parent, record)


def _lone_copy(store: Store) -> Located | None:
    found = [
        Located(store, attempt, store.url, _own_manifest(store, attempt))
        for attempt in attempts(parts_of(store)[0], "")
        if is_there(store, f"{attempt}/{names.MANIFEST}")
    ]
    return max(found, key=lambda where: names.attempt_age(where.manifest.attempt), default=None)
