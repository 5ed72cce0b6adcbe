"""An export on a store: what is known of it, and whether its bytes are what was written."""

from __future__ import annotations

import contextlib

import crc32c

from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.export import MAX_EXPORT_BYTES, ExportedFile, ExportManifest, check_export
from distckpt.format.sealed import unseal
from distckpt.storage import Store

PIECE = 8 << 20


def read_export(store: Store, attempt_folder: str) -> ExportManifest | None:
    """What the export of an attempt consists of, or None if it has none. DamagedError if that cannot be told."""
    path = f"{attempt_folder}/{names.EXPORT}"
    try:
        data = store.read(path, MAX_EXPORT_BYTES)
    except ObjectNotFoundError:
        return None
    shown = f"{store.url}/{path}"
    manifest = unseal(data, ExportManifest, shown, MAX_EXPORT_BYTES)
    check_export(manifest, shown)
    if manifest.attempt != attempt_folder.rpartition("/")[2]:
        raise DamagedError(shown, "it is the export of another attempt")
    return manifest


def file_problem(store: Store, path: str, file: ExportedFile) -> str:
    """Why the file at ``path`` is not what was written, every byte read; '' if it is. StorageError if it cannot be."""
    with contextlib.closing(store.open(path)) as source:
        if source.size != file.size:
            return f"it is {source.size} bytes long and should be {file.size}"
        found, position = 0, 0
        while position < file.size:
            piece = memoryview(bytearray(min(PIECE, file.size - position)))
            source.read_into(position, piece)
            found = crc32c.crc32c(piece, found)
            position += piece.nbytes
    return "" if found == file.crc32c else f"CRC32C is {found:08x} and should be {file.crc32c:08x}"
