"""What stores around a store have in common: they pass on what they do not change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from distckpt.storage.interface import (
    ObjectInfo,
    Source,
    Store,
    SupportsCooling,
    SupportsCopying,
    SupportsExplaining,
    SupportsHidden,
    SupportsSweep,
)


class StoreAround:
    """``inner`` as it is, with all that only some stores support: of one that does not, nothing comes of that."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

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
        """See Store."""
        return self._inner.read(path, max_bytes)

    def open(self, path: str) -> Source:
        """See Store."""
        return self._inner.open(path)

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
        """See Store."""
        self._inner.delete(path)

    def cool(self, path: str) -> None:
        """See SupportsCooling."""
        cool(self._inner, path)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """See SupportsSweep."""
        return self._inner.sweep(left) if isinstance(self._inner, SupportsSweep) else 0

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """See SupportsHidden."""
        return self._inner.hidden(folder) if isinstance(self._inner, SupportsHidden) else iter(())

    def copy(self, source: Store | StoreAround, source_path: str, path: str, size: int) -> ObjectInfo | None:
        """See SupportsCopying. What is around ``source`` does not matter."""
        if not isinstance(self._inner, SupportsCopying):
            return None
        while isinstance(source, StoreAround):
            source = source._inner
        return self._inner.copy(source, source_path, path, size)

    def explain(self) -> str:
        """See SupportsExplaining."""
        return self._inner.explain() if isinstance(self._inner, SupportsExplaining) else ""


def cool(store: Store, path: str) -> None:
    """Whoever reads that object next reads what is stored, if ``store`` knows how."""
    if isinstance(store, SupportsCooling):
        store.cool(path)
