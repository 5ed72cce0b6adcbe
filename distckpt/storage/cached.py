"""A remote store of which shards and indexes are kept on a disk of this host, for all processes of a user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import crc32c

from distckpt.errors import DamagedError
from distckpt.storage.cache import BLOCK_BYTES, BlockCache, Entry
from distckpt.storage.interface import (
    ObjectInfo,
    Source,
    Store,
    SupportsCopying,
    SupportsExplaining,
    SupportsHidden,
    SupportsSweep,
)
from distckpt.storage.names import is_lasting
from distckpt.storage.patience import cool


class CachedStore:
    """``inner``, of which what can never change is read through ``cache``; everything else goes to it as it is.

    Opening asks ``inner`` whether the object is there, and how long: what was deleted is not read from the cache. What
    somebody finds damaged he cools, and reads again: then it is fetched again.
    """

    def __init__(self, inner: Store, cache: BlockCache) -> None:
        self._inner = inner
        self._cache = cache

    @property
    def url(self) -> str:
        """The root of the store underneath."""
        return self._inner.url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        self._inner.put_if_absent(path, data)

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        return self._inner.put_unique(path, size, sections)

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        self._inner.replace(path, data)

    def read(self, path: str, max_bytes: int) -> bytes:
        """See Store. From the cache only if the store has a checksum to compare it with."""
        info = self._inner.stat(path) if is_lasting(path) else None
        if info is not None and info.crc32c is not None and info.size <= max_bytes:
            with contextlib.closing(self.open(path)) as source:
                data = bytearray(source.size)
                source.read_into(0, memoryview(data))
            if len(data) == info.size and crc32c.crc32c(data) == info.crc32c:
                return bytes(data)
            self._drop(path)
        return self._inner.read(path, max_bytes)

    def open(self, path: str) -> Source:
        """See Store."""
        source = self._inner.open(path)
        entry = self._cache.entry(self._key(path)) if is_lasting(path) else None
        return source if entry is None else CachedSource(source, entry, f"{self.url}/{path}")

    def stat(self, path: str) -> ObjectInfo | None:
        """See Store."""
        return self._inner.stat(path)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """See Store."""
        return self._inner.list(folder)

    def folders(self, folder: str) -> Iterator[str]:
        """See Store."""
        return self._inner.folders(folder)

    def delete(self, path: str) -> None:
        """See Store. What the cache has of it is not read any more, and makes room in its time."""
        self._inner.delete(path)

    def cool(self, path: str) -> None:
        """See SupportsCooling: whoever reads it next fetches it."""
        self._drop(path)
        cool(self._inner, path)

    def sweep(self, folder: str, min_age: float) -> int:
        """See SupportsSweep."""
        return self._inner.sweep(folder, min_age) if isinstance(self._inner, SupportsSweep) else 0

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """See SupportsHidden."""
        return self._inner.hidden(folder) if isinstance(self._inner, SupportsHidden) else iter(())

    def copy(self, source: Store | CachedStore, source_path: str, path: str, size: int) -> ObjectInfo | None:
        """See SupportsCopying."""
        if not isinstance(self._inner, SupportsCopying):
            return None
        return self._inner.copy(source._inner if isinstance(source, CachedStore) else source, source_path, path, size)

    def explain(self) -> str:
        """See SupportsExplaining."""
        return self._inner.explain() if isinstance(self._inner, SupportsExplaining) else ""

    def _drop(self, path: str) -> None:
        entry = self._cache.entry(self._key(path), anew=False) if is_lasting(path) else None
        if entry is not None:
            entry.drop()
            entry.close()

    def _key(self, path: str) -> str:
        return f"{self.url}/{path}"


class CachedSource:
    """An object whose blocks come from the cache, and from ``inner`` where that has none."""

    def __init__(self, inner: Source, entry: Entry, where: str) -> None:
        self._inner = inner
        self._entry = entry
        self._where = where

    @property
    def size(self) -> int:
        """The object's size in bytes."""
        return self._inner.size

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the object ends before that."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        target, end = target.cast("B"), position + target.nbytes
        if end > self.size:
            raise DamagedError(self._where, f"ends after {self.size} bytes, {end - self.size} more were expected")
        while target.nbytes:
            number, first = divmod(position, BLOCK_BYTES)
            begin = position - first
            size = min(BLOCK_BYTES, self.size - begin)
            piece = target[: size - first]
            self._entry.read(number, size, first, piece, partial(self._inner.read_into, begin))
            position, target = position + piece.nbytes, target[piece.nbytes :]

    def close(self) -> None:
        """Let go of the object. Closing twice does no harm."""
        self._inner.close()
        self._entry.close()
