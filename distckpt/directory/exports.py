"""An export on a store: what is known of it, and whether its bytes are what was written."""

from __future__ import annotations

from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.export import MAX_EXPORT_BYTES, ExportedFile, ExportManifest
from distckpt.format.json.sealed import unseal
from distckpt.storage import Store, twice
from distckpt.transfer.checksums import stored_size_and_crc


def read_export(store: Store, attempt_folder: str) -> ExportManifest | None:
    """What the export of an attempt consists of, or None if it has none. DamagedError if that cannot be told."""
    return twice(lambda: _read_once(store, attempt_folder))


def _read_once(store: Store, attempt_folder: str) -> ExportManifest | None:
    path = f"{attempt_folder}/{names.EXPORT}"
    try:
        data = store.read(path, MAX_EXPORT_BYTES)
    except ObjectNotFoundError:
        return None
    shown = f"{store.url}/{path}"
    manifest = unseal(data, ExportManifest, shown, MAX_EXPORT_BYTES)
    if manifest.attempt != attempt_folder.rpartition("/")[2]:
        raise DamagedError(shown, "it is the export of another attempt")
    return manifest


def file_problem(store: Store, path: str, file: ExportedFile) -> str:
    """Why the file at ``path`` is not what was written, every byte read; '' if it is. StorageError if it cannot be."""
    return _problem(store, path, file) and _problem(store, path, file)  # one reading proves nothing


def _problem(store: Store, path: str, file: ExportedFile) -> str:
    size, crc = stored_size_and_crc(store, path)
    if size != file.size:
        return f"it is {size} bytes long and should be {file.size}"
    return "" if crc == file.crc32c else f"CRC32C is {crc:08x} and should be {file.crc32c:08x}"
