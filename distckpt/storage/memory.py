"""Objects in this process's memory: for tests, and as the plainest example of what a store has to do."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import crc32c

from distckpt.errors import AlreadyExistsError, DamagedError, ObjectNotFoundError
from distckpt.storage.interface import ObjectInfo, Source
from distckpt.storage.paths import folder_parts, object_parts
from distckpt.storage.sections import checked


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The content of one object, with the time of its writing in epoch seconds and the CRC32C it had then."""

    data: bytes
    modified: float
    crc32c: int


class MemoryStore:
    """Objects in memory. ``objects`` is the content itself, for tests that look from outside or do damage."""

    _named: dict[str, MemoryStore] = {}  # noqa: RUF012  shared on purpose: a name means one store in this process
    _naming = threading.Lock()

    def __init__(self, name: str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.objects: dict[str, StoredObject] = {}
        self._url = f"memory://{name or uuid.uuid4().hex}"
        self._clock = clock
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """The one store of that name in this process; empty when first asked for."""
        with cls._naming:
            if name not in cls._named:
                cls._named[name] = cls(name)
            return cls._named[name]

    @property
    def url(self) -> str:
        """``memory://`` and the store's name."""
        return self._url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` unless it exists. AlreadyExistsError if it does."""
        object_parts(path)
        self._insert(path, bytes(data), overwrite=False)

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Create ``path`` from its sections; it appears when the last one has come. AlreadyExistsError if it exists."""
        object_parts(path)
        if path in self.objects:
            raise AlreadyExistsError(self._full(path))
        data = bytearray()
        for section in checked(size, sections):
            data += section
        return _info(path, self._insert(path, bytes(data), overwrite=False))

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path``, over what may be there."""
        object_parts(path)
        self._insert(path, bytes(data), overwrite=True)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``."""
        data = self._find(path).data
        if len(data) > max_bytes:
            raise DamagedError(self._full(path), f"is {len(data)} bytes long, {max_bytes} are the most it may be")
        return data

    def open(self, path: str) -> Source:
        """Open an object as it is now. ObjectNotFoundError if there is none."""
        return MemorySource(self._full(path), self._find(path).data)

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None."""
        object_parts(path)
        stored = self.objects.get(path)
        return None if stored is None else _info(path, stored)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder``, as it is at the time of the call."""
        depth = len(folder_parts(folder))
        return iter([_info(path, stored) for path, stored in self._below(folder) if path.count("/") == depth])

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``."""
        depth = len(folder_parts(folder))
        parts = [path.split("/") for path, _ in self._below(folder)]
        return iter(sorted({names[depth] for names in parts if len(names) > depth + 1}))

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is gone already."""
        object_parts(path)
        with self._lock:
            self.objects.pop(path, None)

    def _full(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _insert(self, path: str, data: bytes, *, overwrite: bool) -> StoredObject:
        stored = StoredObject(data, self._clock(), crc32c.crc32c(data))
        with self._lock:
            if not overwrite and path in self.objects:
                raise AlreadyExistsError(self._full(path))
            self.objects[path] = stored
        return stored

    def _find(self, path: str) -> StoredObject:
        object_parts(path)
        stored = self.objects.get(path)
        if stored is None:
            raise ObjectNotFoundError(self._full(path))
        return stored

    def _below(self, folder: str) -> Iterator[tuple[str, StoredObject]]:
        prefix = "/".join((*folder_parts(folder), ""))
        with self._lock:
            objects = self.objects.copy()
        return ((path, stored) for path, stored in objects.items() if path.startswith(prefix))


class MemorySource:
    """An object of a MemoryStore as it was when it was opened."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._data = data
        self._closed = False

    @property
    def size(self) -> int:
        """The object's size in bytes."""
        return len(self._data)

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the object ends before that."""
        if self._closed:
            raise ValueError("read from a closed object")
        if position < 0:
            raise ValueError(f"position {position} is negative")
        piece = memoryview(self._data)[position : position + target.nbytes]
        if piece.nbytes < target.nbytes:
            raise DamagedError(
                self._path, f"ends after {self.size} bytes, {target.nbytes - piece.nbytes} more were expected"
            )
        target.cast("B")[:] = piece

    def close(self) -> None:
        """Let go of the object. Closing twice does no harm."""
        self._closed = True


def _info(path: str, stored: StoredObject) -> ObjectInfo:
    return ObjectInfo(path, len(stored.data), stored.modified, stored.crc32c)
