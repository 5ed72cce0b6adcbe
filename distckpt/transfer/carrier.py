"""Objects from one store to another: ranges are read ahead of what is written, in bounded memory, every byte checked."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue

import crc32c
import numpy as np
import numpy.typing as npt

from distckpt.errors import AlreadyExistsError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.storage.interface import ObjectInfo, Source, Store, SupportsCopying
from distckpt.storage.patience import twice
from distckpt.transfer.checksums import stored_size_and_crc
from distckpt.transfer.reader import pace_of

logger = logging.getLogger(__name__)

SECTION = 8 << 20
MEMORY = 256 << 20
"""For all objects under way together, but that a single large one may need more: see ``_window``."""

LEAST_WINDOW = 64 << 20
_PARTS = 32
STUCK_SECONDS = 5.0
_LOCAL_READERS = 4


class Way(Enum):
    """How an object came to be where it is wanted."""

    THERE = "there already"
    SERVER = "copied by the server"
    HERE = "read and written"


@dataclass(frozen=True, slots=True)
class Freight:
    """An object of ``size`` bytes with that CRC32C: at ``source`` in one store, and wanted at ``path`` in the other."""

    source: str
    path: str
    size: int
    crc32c: int


class Carrier:
    """Copies objects from ``source`` to ``target``. For many threads; to be closed.

    What is at the target already, whole, is not copied again: its size and CRC32C say so, as the server tells them, or
    by reading it where there is none that does.
    """

    def __init__(self, source: Store, target: Store) -> None:
        self._source = source
        self._target = target
        readers = max(_LOCAL_READERS, pace_of(source).threads)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="distckpt-carry")
        self._memory = _Memory(MEMORY)

    def carry(self, freight: Freight, moved: Callable[[int], object] = bool) -> Way:
        """Have the object at the target, durable and known to be right; ``moved`` is told of its bytes as they go.

        DamagedError if the source has it no more as it should be, which two readings have shown; StorageError if one of the
        stores fails, or if the target holds something else than was sent. Then nothing of it is at the target.
        """
        path = freight.path
        found = self._target.stat(path)
        if found is not None:
            if self._is_right(found, freight):
                moved(freight.size)
                return Way.THERE
            self._target.delete(path)  # what a killed copy has left: nobody else writes to this name
        if self._copied_by_server(freight):
            moved(freight.size)
            return Way.SERVER
        counted = moved

        def move() -> None:
            nonlocal counted
            moving, counted = counted, bool  # what is read a second time does not count again
            self._move(freight, moving)

        try:
            twice(move)
        except _Mangled as error:
            raise StorageError(error.path, error.reason) from error
        return Way.HERE

    def close(self) -> None:
        """End its threads; what they read is of no use any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _is_right(self, found: ObjectInfo, freight: Freight) -> bool:
        if found.size != freight.size:
            return False
        crc = found.crc32c if found.crc32c is not None else stored_size_and_crc(self._target, freight.path)[1]
        return crc == freight.crc32c

    def _copied_by_server(self, freight: Freight) -> bool:
        if not isinstance(self._target, SupportsCopying):
            return False
        try:
            info = self._target.copy(self._source, freight.source, freight.path, freight.size)
            if info is None:
                return False
            if self._is_right(info, freight):
                return True
            logger.info("%s was copied by the server, and is not what it should be: it is read here", freight.source)
        except ObjectNotFoundError:
            raise
        except AlreadyExistsError:  # by an earlier try, perhaps, of which no answer came
            found = self._target.stat(freight.path)
            if found is None or not self._is_right(found, freight):
                raise
            return True
        except StorageError as error:
            logger.info("the server does not copy %s, so it is read here: %s", freight.source, error)
        self._target.delete(freight.path)
        return False

    def _move(self, freight: Freight, moved: Callable[[int], object]) -> None:
        window = _window(freight.size)
        with self._memory.reserved(window), contextlib.closing(self._source.open(freight.source)) as source:
            sections = _Sections(source, self._pool, freight, window, f"{self._source.url}/{freight.source}")
            info = self._target.put_unique(freight.path, freight.size, sections.all(moved))
        if info.size != freight.size or info.crc32c not in (None, freight.crc32c):
            self._target.delete(freight.path)
            raise _Mangled(
                f"{self._target.url}/{freight.path}", "the store holds other bytes than were sent, two times"
            )


class _Mangled(DamagedError):
    """It is the target that is to blame."""


def _window(size: int) -> int:
    """Bytes of an object that are in memory at once.

    A store that takes parts needs two of them: one that is on its way, and one that is being filled. The largest parts
    are those of Google Cloud Storage, of which an object has 32 at most.
    """
    return min(size, max(LEAST_WINDOW, 2 * (size // _PARTS) + SECTION))


class _Memory:
    """So many bytes, of which each takes what it needs before it begins; what is larger than all of it waits for all."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


class _Sections:
    """The bytes of one object in order, read by a pool as far ahead as the window reaches.

    Each section is memory of its own, which counts until whoever writes it has let go of it.
    """

    def __init__(self, source: Source, pool: ThreadPoolExecutor, freight: Freight, window: int, where: str) -> None:
        self._source = source
        self._pool = pool
        self._freight = freight
        self._where = where
        self._room: SimpleQueue[None] = SimpleQueue()  # may be put to from wherever memory is let go of
        self._sections = max(2, window // SECTION)
        for _ in range(self._sections):
            self._room.put(None)
        self._next = 0
        self._ahead: deque[Future[npt.NDArray[np.uint8]]] = deque()
        self._done = 0
        self._crc = 0

    def all(self, moved: Callable[[int], object]) -> Iterator[memoryview]:
        """Every section. DamagedError before the last one if the whole is not what it should be."""
        freight = self._freight
        if self._source.size != freight.size:
            raise DamagedError(self._where, f"has {self._source.size} bytes and should have {freight.size}")
        try:
            while self._done < freight.size:
                yield self._section(moved)
        finally:
            for reading in self._ahead:
                reading.cancel()
        if not freight.size and freight.crc32c:
            raise DamagedError(self._where, f"is empty, and its CRC32C should be {freight.crc32c:08x}")

    def _section(self, moved: Callable[[int], object]) -> memoryview:
        while self._next < self._freight.size and self._has_room():
            self._begin()
        section = self._ahead.popleft().result()
        self._crc = crc32c.crc32c(section.data, self._crc)
        self._done += section.nbytes
        if self._done == self._freight.size and self._crc != self._freight.crc32c:
            reason = f"CRC32C is {self._crc:08x} and should be {self._freight.crc32c:08x}"
            raise DamagedError(self._where, reason)
        moved(section.nbytes)
        return section.data

    def _has_room(self) -> bool:
        """Whether another section may be begun. With none under way it is waited for, and not for ever: a store may need
        more than expected before it lets go of anything, and is given twice as much then."""
        try:
            self._room.get(block=not self._ahead, timeout=STUCK_SECONDS)
        except Empty:
            if self._ahead:
                return False
            for _ in range(self._sections - 1):
                self._room.put(None)
            self._sections *= 2
        return True

    def _begin(self) -> None:
        section = np.empty(min(SECTION, self._freight.size - self._next), dtype=np.uint8)
        weakref.finalize(section, self._room.put, None).atexit = False
        self._ahead.append(self._pool.submit(_filled, self._source, self._next, section))
        self._next += section.nbytes


def _filled(source: Source, position: int, section: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    source.read_into(position, section.data)
    return section
