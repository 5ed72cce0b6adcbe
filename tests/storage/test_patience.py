"""Reads that fail once are tried again, wherever they are asked for, and one damaged reading is no damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import AccessDeniedError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, PatientStore, Store, patience, twice
from distckpt.testing.faulty import Call, Fault, FaultyStore, Operation

READS: dict[Operation, Callable[[Store], Any]] = {
    "read": lambda store: store.read("log/1", 10),
    "open": lambda store: store.open("log/1").size,
    "read_into": lambda store: _range(store, "log/1", 1, 3),
    "stat": lambda store: store.stat("log/1"),
    "list": lambda store: list(store.list("log")),
    "folders": lambda store: list(store.folders("")),
}


def _range(store: Store, path: str, position: int, size: int) -> bytes:
    target = bytearray(size)
    source = store.open(path)
    source.read_into(position, memoryview(target))
    source.close()
    return bytes(target)


class FirstFail:
    """The first ``count`` calls of an operation fail."""

    def __init__(self, operation: Operation, count: int) -> None:
        self.operation = operation
        self.left = count

    def fault(self, call: Call) -> Fault | None:
        """A fault, as long as there are any left."""
        if call.operation != self.operation or not self.left:
            return None
        self.left -= 1
        return Fault.BEFORE


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept; nobody really sleeps."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def stores(operation: Operation, count: int) -> tuple[PatientStore, FaultyStore]:
    inner = MemoryStore()
    inner.put_if_absent("log/1", b"12345")
    faulty = FaultyStore(inner, FirstFail(operation, count))
    return PatientStore(faulty), faulty


@pytest.mark.parametrize("count", [1, len(patience.PAUSES)])
@pytest.mark.parametrize("operation", READS)
def test_a_read_that_fails_is_tried_again(operation: Operation, count: int, pauses: list[float]) -> None:
    store, faulty = stores(operation, count)
    assert READS[operation](store) == READS[operation](faulty.inner)
    assert sum(call.operation == operation for call in faulty.calls) == count + 1
    assert sum(pauses) <= sum(patience.PAUSES)


@pytest.mark.parametrize(
    "operation", sorted(READS.keys() - {"read_into"})
)  # before which the store answers: it was opened
def test_a_store_that_is_lost_is_asked_once_a_call_until_it_answers(operation: Operation, pauses: list[float]) -> None:
    store, faulty = stores(operation, 1000)
    with pytest.raises(StorageError, match="scripted"):
        READS[operation](store)
    waited, asked = len(pauses), len(faulty.calls)
    with pytest.raises(StorageError, match="scripted"):
        READS[operation](store)
    assert len(pauses) == waited
    assert len(faulty.calls) - asked <= 3
    faulty.script = FirstFail(operation, 0)
    READS[operation](store)
    faulty.script = FirstFail(operation, 2)
    READS[operation](store)


def test_that_there_is_no_such_object_is_an_answer(pauses: list[float]) -> None:
    store = PatientStore(MemoryStore())
    with pytest.raises(ObjectNotFoundError):
        store.read("nothing", 1)
    with pytest.raises(ObjectNotFoundError):
        store.open("nothing")
    assert store.stat("nothing") is None
    assert pauses == []


class Closed(MemoryStore):
    """Nobody may see anything."""

    def stat(self, path: str) -> ObjectInfo | None:
        """No."""
        raise AccessDeniedError(path, "not you")

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """No."""
        raise AccessDeniedError(folder, "not you")


def test_that_one_has_no_right_is_an_answer(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    store = PatientStore(Closed())
    for ask in (lambda: store.stat("a"), lambda: list(store.list(""))):
        with pytest.raises(AccessDeniedError, match="not you"):
            ask()
    assert pauses == []
    assert caplog.text == ""


def test_writes_are_not_repeated(pauses: list[float]) -> None:
    writes: dict[Operation, Callable[[Store], object]] = {
        "put_if_absent": lambda store: store.put_if_absent("a", b"1"),
        "put_unique": lambda store: store.put_unique("a", 1, [memoryview(b"1")]),
        "replace": lambda store: store.replace("a", b"1"),
        "delete": lambda store: store.delete("log/1"),
    }
    for operation, write in writes.items():
        store, faulty = stores(operation, 1)
        with pytest.raises(StorageError, match="scripted"):
            write(store)
        assert [call.operation for call in faulty.calls] == [operation]
    assert pauses == []


class BreaksOff(MemoryStore):
    """Listings break off after ``after`` names, once."""

    after: int | None = None

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """As far as it goes."""
        for count, info in enumerate(super().list(folder)):
            if count == self.after:
                self.after = None
                raise StorageError(folder, "the listing broke off")
            yield info


def test_a_listing_that_breaks_off_gives_everything_once() -> None:
    inner = BreaksOff()
    for number in range(9):
        inner.put_if_absent(f"log/{number}", b"x")
    inner.after = 5
    assert sorted(info.path for info in PatientStore(inner).list("log")) == [f"log/{number}" for number in range(9)]


def test_a_handle_that_has_become_stale_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LocalStore(tmp_path).put_if_absent("a", b"12345")
    source = PatientStore(LocalStore(tmp_path)).open("a")
    stale = {int(fd) for fd in os.listdir("/proc/self/fd")}
    preadv = os.preadv

    def failing(fd: int, *rest: Any) -> int:
        if fd in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", failing)
    target = bytearray(3)
    source.read_into(1, memoryview(target))
    source.close()
    assert target == b"234"


def test_damage_is_what_two_readings_find(caplog: pytest.LogCaptureFixture) -> None:
    readings = iter(
        [DamagedError("/x", "flipped"), "good", "good", DamagedError("/x", "flipped"), DamagedError("/x", "cut")]
    )

    def read() -> str:
        reading = next(readings)
        if isinstance(reading, DamagedError):
            raise reading
        return reading

    assert twice(read) == "good"
    assert "/x: flipped" in caplog.text
    assert twice(read) == "good"
    with pytest.raises(DamagedError, match="cut"):
        twice(read)
