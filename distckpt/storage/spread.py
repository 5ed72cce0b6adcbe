"""Shards spread over key prefixes, for a bucket that takes only so many requests a second below each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from distckpt.storage.around import cool
from distckpt.storage.interface import ObjectInfo, Source, Store, SupportsHidden, SupportsSweep

SPREAD = "{spread}"
"""In the URL of a place for shards: where each of them has the hex digit of its own name."""

DIGITS = "0123456789abcdef"


def spread_of(path: str) -> str:
    """The hex digit that stands for ``{spread}`` in the URL of the object at ``path``: the first of its path's SHA-256."""
    return hashlib.sha256(path.encode()).hexdigest()[0]


def is_spread(url: str) -> bool:
    """Whether the objects of that place have different prefixes."""
    return "://" in url and SPREAD in url


def spread_place(url: str, path: str) -> str:
    """Where the object at ``path`` of that place is, whether or not the place is spread."""
    return f"{url.replace(SPREAD, spread_of(path)) if is_spread(url) else url}/{path}"


class SpreadStore:
    """The sixteen places that ``url`` names with a hex digit for ``{spread}``, as one; ``store_of`` opens each of them.

    What is at a path is in the place of ``spread_of`` it, and nowhere else; a listing is one of each place.
    """

    def __init__(self, url: str, store_of: Callable[[str], Store]) -> None:
        self._url = url
        self._stores: Mapping[str, Store] = {digit: store_of(url.replace(SPREAD, digit)) for digit in DIGITS}

    @property
    def url(self) -> str:
        """The URL of the place, with ``{spread}`` in it."""
        return self._url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        self._of(path).put_if_absent(path, data)

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        return self._of(path).put_unique(path, size, sections)

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        self._of(path).replace(path, data)

    def read(self, path: str, max_bytes: int) -> bytes:
        """See Store."""
        return self._of(path).read(path, max_bytes)

    def open(self, path: str) -> Source:
        """See Store."""
        return self._of(path).open(path)

    def stat(self, path: str) -> ObjectInfo | None:
        """See Store."""
        return self._of(path).stat(path)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """See Store. Of all places, one after the other."""
        return itertools.chain.from_iterable(store.list(folder) for store in self._stores.values())

    def folders(self, folder: str) -> Iterator[str]:
        """See Store. Of all places, each once."""
        return iter(dict.fromkeys(name for store in self._stores.values() for name in store.folders(folder)))

    def delete(self, path: str) -> None:
        """See Store."""
        self._of(path).delete(path)

    def cool(self, path: str) -> None:
        """See SupportsCooling."""
        cool(self._of(path), path)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """See SupportsSweep."""
        return sum(
            store.sweep([info for info in left if spread_of(info.path) == digit])
            for digit, store in self._stores.items()
            if isinstance(store, SupportsSweep)
        )

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """See SupportsHidden. Of all places."""
        for store in self._stores.values():
            if isinstance(store, SupportsHidden):
                yield from store.hidden(folder)

    def _of(self, path: str) -> Store:
        return self._stores[spread_of(path)]
