"""What is carried from store to store arrives right, in bounded memory, whatever the stores hold on to."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import crc32c
import pytest

from distckpt.errors import DamagedError, StorageError
from distckpt.storage import MemoryStore, ObjectInfo, Source
from distckpt.testing.observing import MIB, pattern
from distckpt.transfer import carrier
from distckpt.transfer.carrier import Carrier, Freight, Way

SIZE = 24 * MIB + 5


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "SECTION", MIB)
    monkeypatch.setattr(carrier, "LEAST_WINDOW", 4 * MIB)
    monkeypatch.setattr(carrier, "MEMORY", 8 * MIB)
    monkeypatch.setattr(carrier, "STUCK_SECONDS", 0.05)


class Counted(MemoryStore):
    """Knows how many bytes have been asked for, and how many of them a target has let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0
        self.most = 0
        self.lock = threading.Lock()

    def open(self, path: str) -> Source:
        """See Store."""
        return _CountedSource(super().open(path), self)

    def count(self, nbytes: int) -> None:
        with self.lock:
            self.ahead += nbytes
            self.most = max(self.most, self.ahead)


class _CountedSource:
    def __init__(self, inner: Source, store: Counted) -> None:
        self._inner = inner
        self._store = store

    @property
    def size(self) -> int:
        return self._inner.size

    def read_into(self, position: int, target: memoryview) -> None:
        self._store.count(target.nbytes)
        self._inner.read_into(position, target)

    def close(self) -> None:
        self._inner.close()


class Slow(MemoryStore):
    """Takes one section after the other, and lets go of each."""

    def __init__(self, source: Counted) -> None:
        super().__init__()
        self._source = source

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""

        def taken() -> Iterator[memoryview]:
            for section in sections:
                self._source.count(-section.nbytes)
                yield memoryview(bytes(section))
                del section

        return super().put_unique(path, size, taken())


class Clinging(MemoryStore):
    """Lets go of nothing before it has all."""

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        return super().put_unique(path, size, list(sections))


class Forgetful(MemoryStore):
    """Holds something else than it was sent."""

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        return super().put_unique(path, size, [memoryview(bytes(section.nbytes)) for section in sections])


def freight(path: str, data: bytes) -> Freight:
    return Freight(path, f"there/{path}", len(data), crc32c.crc32c(data))


def test_no_more_is_read_ahead_than_the_window_has_room_for_however_many_go_at_once() -> None:
    source = Counted()
    target = Slow(source)
    data = pattern(SIZE)
    for number in range(6):
        source.put_if_absent(f"{number}", data)
    going = Carrier(source, target)
    with ThreadPoolExecutor(6) as pool:
        ways = list(pool.map(lambda number: going.carry(freight(f"{number}", data)), range(6)))
    going.close()
    assert ways == [Way.HERE] * 6
    assert all(target.objects[f"there/{number}"].data == data for number in range(6))
    assert source.most <= 2 * (4 + 2) * MIB, "two objects, and what each has just handed over"


def test_a_store_that_needs_more_memory_than_expected_gets_it() -> None:
    source, target, data = MemoryStore(), Clinging(), pattern(SIZE)
    source.put_if_absent("large", data)
    going = Carrier(source, target)
    assert going.carry(freight("large", data)) is Way.HERE
    assert target.objects["there/large"].data == data
    assert going.carry(freight("large", data)) is Way.THERE
    going.close()


@pytest.mark.parametrize("size", [0, 1, MIB, SIZE])
def test_other_bytes_than_expected_leave_nothing(size: int) -> None:
    source, target, data = MemoryStore(), MemoryStore(), pattern(size)
    source.put_if_absent("damaged", data)
    going = Carrier(source, target)
    for told in (Freight("damaged", "there", size, crc32c.crc32c(data) ^ 1), Freight("damaged", "there", size + 1, 0)):
        with pytest.raises(DamagedError, match="damaged"):
            going.carry(told)
        assert target.objects == {}
    going.close()


def test_a_target_that_holds_other_bytes_is_to_blame_and_keeps_nothing() -> None:
    source, target, data = MemoryStore(), Forgetful(), pattern(SIZE)
    source.put_if_absent("large", data)
    going = Carrier(source, target)
    with pytest.raises(StorageError, match="other bytes than were sent"):
        going.carry(freight("large", data))
    assert target.objects == {}
    going.close()
