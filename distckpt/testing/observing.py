"""Eyes on a store: a view from outside, readers that never stop looking, and writers that all start at once."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from distckpt.errors import AlreadyExistsError, ObjectNotFoundError
from distckpt.storage.interface import Store

MIB = 1 << 20
MOST = 64 * MIB


class Outside(Protocol):
    """A way to a store's objects that does not lead through the store, so that it cannot agree with its own lies."""

    def read(self, path: str) -> bytes | None:
        """The object's content, or None if there is no such object."""

    def write(self, path: str, data: bytes) -> None:
        """Put an object there, as another program would."""


class Watching:
    """Reads an object over and over in two threads; the set of contents seen is complete after the block."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path
        self._done = threading.Event()
        self._seen: set[bytes] = set()
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> set[bytes]:
        self._readers = [self._pool.submit(self._read) for _ in range(2)]
        return self._seen

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._pool.shutdown()
        for reader in self._readers:
            reader.result()

    def _read(self) -> None:
        while not self._done.is_set():
            with contextlib.suppress(ObjectNotFoundError):
                self._seen.add(self._store.read(self._path, MOST))
            self._done.wait(0.0002)


def race(store: Store, path: str, contents: list[bytes]) -> tuple[set[bytes], list[bytes]]:
    """What readers saw, and which contents' writers were told that they had won."""
    with Watching(store, path) as seen:
        won = winners(lambda content: store.put_if_absent(path, content), contents)
    return seen, won


def winners(put: Callable[[bytes], None], contents: list[bytes]) -> list[bytes]:
    """Those of ``contents`` whose writers, one thread each, all at the same moment, were told that they had won."""
    start = threading.Barrier(len(contents))

    def attempt(content: bytes) -> bool:
        start.wait()
        try:
            put(content)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(len(contents)) as pool:
        won = list(pool.map(attempt, contents))
    return [content for content, is_winner in zip(contents, won, strict=True) if is_winner]


def pattern(size: int) -> bytes:
    """Bytes that differ from page to page, so that anything misplaced shows."""
    words = b"".join(number.to_bytes(8, "little") for number in range(1, 514))
    return (words * (size // len(words) + 1))[:size]


def sections_of(data: bytes, length: int) -> Iterator[memoryview]:
    """``data`` in sections of ``length`` bytes."""
    view = memoryview(data)
    return (view[start : start + length] for start in range(0, len(data), length))


def aligned(data: bytes) -> memoryview:
    """``data`` in memory that begins at a page, so that it can go to the disk with O_DIRECT."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def everything(store: Store, folder: str = "") -> dict[str, int]:
    """The sizes in bytes of all objects below a folder, at any depth."""
    found = {info.path: info.size for info in store.list(folder)}
    for name in store.folders(folder):
        found |= everything(store, f"{folder}/{name}" if folder else name)
    return found


def files_below(root: Path) -> set[str]:
    """The relative paths of all files below a local folder, hidden ones too."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def share_in_memory(path: Path) -> float:
    """How much of a file the page cache holds, from 0 to 1. Reads nothing of it."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(memory)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(memory)), pages
        )
        del start  # or the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in pages) / len(pages)
