"""A directory whose shards lie in another store."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

from distckpt.errors import ObjectNotFoundError
from distckpt.storage.around import cool
from distckpt.storage.interface import ObjectInfo, Source, Store, SupportsExplaining, SupportsHidden, SupportsSweep
from distckpt.storage.names import holds_shards, is_shard
from distckpt.storage.spread import spread_place

_Found = TypeVar("_Found")


class SplitStore:
    """Shards in ``data``, everything else in ``home``, whose URL it has: log, manifests, indexes and exports.

    A shard that is not in ``data`` is looked for in ``home``, where those lie that were written before there was a store
    for data. Nothing that is asked of ``home`` alone needs ``data``. Other directories may have their shards there, too,
    as names of attempts are unique; they are listed with ours.
    """

    def __init__(self, home: Store, data: Store) -> None:
        self.home = home
        self.data = data

    @property
    def url(self) -> str:
        """The root of the store that has the log."""
        return self.home.url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        self.home.put_if_absent(path, data)

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        return self._of(path).put_unique(path, size, sections)

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        self.home.replace(path, data)

    def read(self, path: str, max_bytes: int) -> bytes:
        """See Store."""
        return self._found(path, lambda store: store.read(path, max_bytes))

    def open(self, path: str) -> Source:
        """See Store."""
        return self._found(path, lambda store: store.open(path))

    def stat(self, path: str) -> ObjectInfo | None:
        """See Store."""
        found = self._of(path).stat(path)
        return self.home.stat(path) if found is None and is_shard(path) else found

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """See Store. Of an attempt's folder both, the shards last."""
        stores = parts_of(self) if holds_shards(folder) else (self.home,)
        return itertools.chain.from_iterable(store.list(folder) for store in stores)

    def folders(self, folder: str) -> Iterator[str]:
        """See Store. Those above attempts are of both, each once."""
        stores = parts_of(self) if "/" not in folder else (self.home,)
        return iter(dict.fromkeys(name for store in stores for name in store.folders(folder)))

    def delete(self, path: str) -> None:
        """See Store."""
        self.home.delete(path)
        if is_shard(path):
            self.data.delete(path)

    def cool(self, path: str) -> None:
        """See SupportsCooling."""
        cool(self._of(path), path)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """See SupportsSweep. Of both."""
        return sum(store.sweep(left) for store in parts_of(self) if isinstance(store, SupportsSweep))

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """See SupportsHidden. Of both."""
        for store in parts_of(self):
            if isinstance(store, SupportsHidden):
                yield from store.hidden(folder)

    def explain(self) -> str:
        """See SupportsExplaining. Of the store that has the log."""
        return self.home.explain() if isinstance(self.home, SupportsExplaining) else ""

    def _of(self, path: str) -> Store:
        return self.data if is_shard(path) else self.home

    def _found(self, path: str, read: Callable[[Store], _Found]) -> _Found:
        try:
            return read(self._of(path))
        except ObjectNotFoundError:
            if not is_shard(path):
                raise
            try:
                return read(self.home)
            except ObjectNotFoundError:
                pass
            raise


def parts_of(store: Store) -> tuple[Store, ...]:
    """The store that has the log, and then that for data, if it is another one."""
    return (store.home, store.data) if isinstance(store, SplitStore) else (store,)


def has_far_shards(store: Store) -> bool:
    """Whether shards are behind a URL, where a request takes long and many at a time take no longer."""
    return "://" in parts_of(store)[-1].url


def place_of(store: Store, path: str) -> str:
    """Where an object is to be found, for people."""
    return spread_place(parts_of(store)[-1 if is_shard(path) else 0].url, path)


def mark_of(store: Store) -> str:
    """What is noted of where shards were put: '' for beside the log, else a digest, as nobody is to follow it."""
    _, *data = parts_of(store)
    return hashlib.sha256(data[0].url.encode()).hexdigest()[:16] if data else ""
