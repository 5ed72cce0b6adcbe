"""Files that libraries can only write to a local path, and their way into a store."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import crc32c

from distckpt.errors import StorageError
from distckpt.storage.interface import Store

SECTION = 16 << 20


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder in the system's place for temporary files (``TMPDIR``), gone with all that is in it on exit."""
    with tempfile.TemporaryDirectory(prefix="distckpt-") as folder:
        yield folder


def put_file(store: Store, path: str, local: str) -> tuple[int, int]:
    """Write a local file to the store under a name that nobody else uses, durable on return; its size and CRC32C.

    StorageError if the store has another size, or another checksum of its own, than what was read here.
    """
    size = os.path.getsize(local)
    found = 0

    def sections() -> Iterator[memoryview]:
        nonlocal found
        with open(local, "rb") as file:
            while section := file.read(SECTION):
                found = crc32c.crc32c(section, found)
                yield memoryview(section)

    info = store.put_unique(path, size, sections())
    if info.size != size or info.crc32c not in (None, found):
        raise StorageError(f"{store.url}/{path}", "what the store has is not what was written")
    return size, found
