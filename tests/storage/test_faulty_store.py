"""The store that fails on cue: each fault does what it says, and the history tells it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from distckpt.errors import (
    AlreadyExistsError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
)
from distckpt.storage import MemoryStore, Store
from distckpt.testing.faulty import (
    Call,
    Fault,
    FaultAt,
    FaultOn,
    FaultyStore,
    RandomFaults,
    faults_of,
    rewritten,
)
from distckpt.testing.observing import MIB, pattern, sections_of


def faulty(fault: Fault, index: int = 0) -> tuple[FaultyStore, MemoryStore]:
    inner = MemoryStore()
    return FaultyStore(inner, FaultAt(index, fault)), inner


@pytest.mark.parametrize(
    ("fault", "error", "applied"),
    [
        (Fault.BEFORE, StorageError, False),
        (Fault.FULL, StorageFullError, False),
        (Fault.NO_ANSWER, StoreOutcomeUnknownError, False),
        (Fault.LOST_ANSWER, StoreOutcomeUnknownError, True),
        (Fault.LOST_ANSWER_AS_REFUSAL, AlreadyExistsError, True),
        (Fault.REFUSED, AlreadyExistsError, False),
        (Fault.GONE, StorageError, False),
    ],
)
@pytest.mark.parametrize("operation", ["put_if_absent", "put_unique"])
def test_a_write_fails_as_told(operation: str, fault: Fault, error: type[StorageError], applied: bool) -> None:
    store, inner = faulty(fault)
    put = {
        "put_if_absent": lambda: store.put_if_absent("a", b"12345"),
        "put_unique": lambda: store.put_unique("a", 5, [memoryview(b"12345")]),
    }
    with pytest.raises(error) as caught:
        put[operation]()
    assert type(caught.value) is error
    assert ("a" in inner.objects) == applied
    outcome = "refused" if error is AlreadyExistsError else "failed"
    assert store.calls == (Call(0, operation, "a", 0, 5, fault, applied, outcome),)  # type: ignore[arg-type]


def test_a_lost_answer_may_be_a_refusal() -> None:
    store, inner = faulty(Fault.LOST_ANSWER)
    inner.put_if_absent("a", b"theirs")
    with pytest.raises(StoreOutcomeUnknownError):
        store.put_if_absent("a", b"ours")
    assert inner.read("a", 10) == b"theirs"
    assert not store.calls[0].applied


def test_a_late_write_is_done_before_the_next_call() -> None:
    store, inner = faulty(Fault.LATE)
    with pytest.raises(StoreOutcomeUnknownError):
        store.put_if_absent("a", b"late")
    assert "a" not in inner.objects
    assert store.read("a", 10) == b"late"
    assert store.calls[0].applied


def test_a_late_write_may_lose() -> None:
    store, inner = faulty(Fault.LATE)
    with pytest.raises(StoreOutcomeUnknownError):
        store.put_if_absent("a", b"late")
    inner.put_if_absent("a", b"faster")
    store.heal()
    assert store.read("a", 10) == b"faster"
    assert not store.calls[0].applied


@pytest.mark.parametrize(("size", "half"), [(5 * MIB + 3, 2 * MIB), (100, 50), (1, 0)])
def test_a_torn_write_leaves_half(size: int, half: int) -> None:
    store, inner = faulty(Fault.TORN)
    data = pattern(size)
    with pytest.raises(StorageError):
        store.put_unique("a", size, sections_of(data, MIB))
    assert inner.read("a", size) == data[:half]


def test_a_delayed_call_is_done_after_a_while() -> None:
    slept: list[float] = []
    store = FaultyStore(MemoryStore(), FaultAt(0, Fault.DELAYED), delay=7.5, sleep=slept.append)
    store.put_if_absent("a", b"1")
    assert slept == [7.5]
    assert store.read("a", 10) == b"1"


def test_what_is_gone_stays_gone_until_healed() -> None:
    store, inner = faulty(Fault.GONE, index=1)
    store.put_if_absent("a", b"1")
    for _ in range(3):
        with pytest.raises(StorageError):
            store.put_if_absent("b", b"2")
        with pytest.raises(StorageError):
            store.read("a", 10)
    assert set(inner.objects) == {"a"}
    store.heal()
    assert store.read("a", 10) == b"1"


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_a_meaning_for_every_operation(fault: Fault) -> None:
    def calls(store: Store) -> Iterator[object]:
        yield store.read("a", 10)
        yield store.stat("a")
        yield list(store.list(""))
        yield list(store.folders(""))
        yield store.open("a").read_into(0, memoryview(bytearray(1)))
        yield store.delete("a")

    spoiling = {(0, Fault.SHORT), (0, Fault.FLIPPED), (5, Fault.FLIPPED)}
    for index in range(7):
        store, inner = faulty(fault, index)
        inner.put_if_absent("a", b"1")
        if fault is Fault.DELAYED or (index, fault) in spoiling:
            assert len(list(calls(store))) == 6
        else:
            with pytest.raises(MemoryError if fault is Fault.NO_MEMORY else (StorageError, DamagedError)):
                list(calls(store))
        assert store.calls[index].fault is fault


@pytest.mark.parametrize(("fault", "found"), [(Fault.SHORT, b"12"), (Fault.FLIPPED, b"12245")])
def test_what_is_read_is_spoiled(fault: Fault, found: bytes) -> None:
    store, inner = faulty(fault)
    inner.put_if_absent("a", b"12345")
    assert store.read("a", 10) == found
    assert store.read("a", 10) == b"12345"
    store, inner = faulty(fault, index=1)
    inner.put_if_absent("a", b"12345")
    source, target = store.open("a"), bytearray(5)
    if fault is Fault.SHORT:
        with pytest.raises(DamagedError):
            source.read_into(0, memoryview(target))
    else:
        source.read_into(0, memoryview(target))
        assert target == found


def test_a_late_delete_is_done_before_the_next_call() -> None:
    store, inner = faulty(Fault.LATE)
    inner.put_if_absent("a", b"1")
    with pytest.raises(StoreOutcomeUnknownError):
        store.delete("a")
    assert inner.read("a", 10) == b"1"
    assert store.stat("a") is None


def test_reads_of_an_open_object_count() -> None:
    inner = MemoryStore()
    inner.put_if_absent("a", b"12345")
    store = FaultyStore(inner, FaultOn("read_into", Fault.BEFORE, "a", nth=1))
    source = store.open("a")
    target = memoryview(bytearray(5))
    source.read_into(0, target)
    with pytest.raises(StorageError):
        source.read_into(0, target)
    source.read_into(0, target)
    source.close()
    assert [call.operation for call in store.calls] == ["open", "read_into", "read_into", "read_into"]


def test_a_fault_can_be_aimed_at_a_folder() -> None:
    store = FaultyStore(MemoryStore(), FaultOn("put_if_absent", Fault.FULL, "_log/"))
    store.put_if_absent("ckpt-1/manifest.json", b"1")
    with pytest.raises(StorageFullError):
        store.put_if_absent("_log/1", b"1")
    store.put_if_absent("_log/1", b"1")


def random_history(seed: int, threads: int) -> dict[tuple[str, int], Fault | None]:
    store = FaultyStore(MemoryStore(), RandomFaults(seed, 0.5), delay=0)

    def work(worker: int) -> None:
        for number in range(worker, 60, threads):
            for _ in range(2):
                try:
                    store.put_if_absent(f"log/{number}", b"x")
                except StorageError:
                    continue

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {(call.path, call.nth): call.fault for call in store.calls}


def test_random_faults_follow_from_the_seed_alone() -> None:
    once = random_history(seed=5, threads=1)
    assert once == random_history(seed=5, threads=4)
    assert once != random_history(seed=6, threads=1)
    kinds = set(once.values())
    assert None in kinds
    assert kinds - {None} <= set(faults_of("put_if_absent"))
    assert len(kinds) > 4


def append(store: Store, path: str, data: bytes) -> None:
    """How a log entry has to be written: whatever the answer was, look what is there."""
    for _ in range(10):
        with contextlib.suppress(StorageError):
            store.put_if_absent(path, data)
            return
        with contextlib.suppress(ObjectNotFoundError):
            if store.read(path, 100) == data:
                return
            raise AlreadyExistsError(path)
    raise StoreOutcomeUnknownError(path, "no answer")


def test_an_operation_can_be_failed_at_every_call_in_every_way() -> None:
    def run(store: Store) -> None:
        append(store, "log/1", b"first")
        append(store, "log/2", b"second")

    quiet = FaultyStore(MemoryStore())
    run(quiet)
    cases = [(call.index, fault) for call in quiet.calls for fault in faults_of(call.operation)]
    assert len(cases) == 2 * len(faults_of("put_if_absent"))
    for index, fault in cases:
        store, inner = faulty(fault, index)
        if fault is Fault.GONE:
            with pytest.raises(StorageError):
                run(store)
        else:
            run(store)
            assert [inner.read(f"log/{number}", 10) for number in (1, 2)] == [b"first", b"second"]
        assert rewritten(store.calls) == ()


def test_a_rewritten_object_is_found_in_the_history() -> None:
    store = FaultyStore(MemoryStore())
    store.put_if_absent("log/1", b"1")
    store.replace("checkpoint", b"1")
    store.replace("checkpoint", b"2")
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"2")
    assert rewritten(store.calls) == ()
    store.replace("log/1", b"2")
    store.delete("log/1")
    store.put_if_absent("log/1", b"3")
    assert [(call.operation, call.path) for call in rewritten(store.calls)] == [
        ("replace", "log/1"),
        ("put_if_absent", "log/1"),
    ]
