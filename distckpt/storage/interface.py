"""What distckpt asks of a store. Paths are relative to the store's root, with ``/`` between parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as the store sees it: ``size`` in bytes, ``modified`` in epoch seconds of the store's clock, 0 if it has none.

    ``crc32c`` is the store's own checksum of the content, where it keeps one, else None.
    """

    path: str
    size: int
    modified: float
    crc32c: int | None = None


@runtime_checkable
class Source(Protocol):
    """An object open for reading. Safe to use from several threads at once."""

    @property
    def size(self) -> int:
        """The object's size in bytes."""

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the object ends before that."""

    def close(self) -> None:
        """Let go of the object. Closing twice does no harm."""


@runtime_checkable
class Store(Protocol):
    """Objects under one root. No rename, no append, no unconditional overwrite of anything that matters.

    Every method raises StorageError (or one of its kinds), never a bare OSError. What reads raises it where it has got no
    answer, so that the same call may succeed later; and DamagedError where what is there is no object of a store.
    """

    @property
    def url(self) -> str:
        """The canonical root: an absolute local path, or a URL without a slash at its end."""

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` with ``data``, whole and durable, unless it exists: exactly one of many callers wins.

        Raises AlreadyExistsError when the name is taken, BlockedError when it is by something that is no object,
        StoreOutcomeUnknownError when the store answered neither yes nor no. A lost acknowledgement may surface as
        AlreadyExistsError or as that, so callers read back and compare.
        """

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write a large object under a name that nobody else uses; durable on return.

        ``sections`` are consecutive and sum to ``size`` bytes; each but the last is a multiple of 1 MiB long, and may
        be produced while those before it are being written: their bytes stay as they are until this returns, and a
        store lets go of each when it is written. An object that already exists is never touched: AlreadyExistsError.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path`` whole, over what may be there. Only for derived or expiring objects (``checkpoint``, leases)."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``."""

    def open(self, path: str) -> Source:
        """Open an object for ranged reads. ObjectNotFoundError if there is none."""

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None. Never from a cache."""

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder`` ('' is the root), in no particular order. Never from a cache.

        They are found one after the other, so that who has seen enough can stop. Empty if there are none.
        """

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``, found likewise."""

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is gone already."""


@runtime_checkable
class SupportsCooling(Protocol):
    """A store of whose objects the host's memory may keep copies, which readers get instead."""

    def cool(self, path: str) -> None:
        """Have memory keep nothing of an object: whoever reads it next reads what is stored. Raises nothing."""


@runtime_checkable
class SupportsSweep(Protocol):
    """A store whose killed writers leave things behind that no listing shows, but ``hidden`` does."""

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """Remove of what ``hidden`` shows what is still as ``left`` says, since whoever calls knows that it is dead.

        Returns how many things went.
        """


@runtime_checkable
class SupportsHidden(Protocol):
    """A store in which something may lie that no listing shows, and that can tell what."""

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """What writers that live or were killed have directly below ``folder``; all of the store, if it keeps that in one place

        and ``folder`` is the root. A thing has one path, the size of all its parts, and the time of its last touch.
        """


@runtime_checkable
class SupportsCopying(Protocol):
    """A store that can have an object of another one copied without its bytes coming here."""

    def copy(self, source: Store, source_path: str, path: str, size: int) -> ObjectInfo | None:
        """Create ``path`` with what is at ``source_path`` of ``source``, of ``size`` bytes; durable on return.

        None if this store cannot do that with that source or that size: then nothing was done. AlreadyExistsError if
        ``path`` exists; ObjectNotFoundError if there is nothing to copy.
        """


@runtime_checkable
class SupportsSiblings(Protocol):
    """A store of a folder in a bucket that can give another one in the same bucket."""

    def sibling(self, folder: str) -> Store:
        """What is below ``folder`` of the bucket, reached through the same connections, within the same budget."""


@runtime_checkable
class SupportsExplaining(Protocol):
    """A store of which it is known only when it is tried whether it keeps its promises."""

    def explain(self) -> str:
        """What it does to create an object once, for the message that says that this does not hold."""
