"""A remote store of which shards and indexes are kept on a disk of this host, for all processes of a user."""

from __future__ import annotations

import contextlib
from functools import partial

import crc32c

from distckpt.storage.around import StoreAround
from distckpt.storage.bounds import require_within
from distckpt.storage.cache import BLOCK_BYTES, BlockCache, Entry
from distckpt.storage.interface import Source, Store
from distckpt.storage.names import is_lasting


class CachedStore(StoreAround):
    """``inner``, of which what can never change is read through ``cache``; everything else goes to it as it is.

    Opening asks ``inner`` whether the object is there, and how long: what was deleted is not read from the cache, and
    makes room in its time. What somebody finds damaged he cools, and reads again: then it is fetched again.
    """

    def __init__(self, inner: Store, cache: BlockCache) -> None:
        super().__init__(inner)
        self._cache = cache

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

    def cool(self, path: str) -> None:
        """See SupportsCooling: whoever reads it next fetches it."""
        self._drop(path)
        super().cool(path)

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
        target = target.cast("B")
        require_within(self.size, position, target.nbytes, self._where)
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
