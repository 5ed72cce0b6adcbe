"""Every shipped store against the conformance kit, and the kit and the probe against stores that lie."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import crc32c
import pytest

from distckpt.errors import ObjectNotFoundError, StorageError, StoreUnsuitableError
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, PatientStore, Store, probe
from distckpt.storage.memory import StoredObject
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.faulty import FaultyStore
from distckpt.testing.observing import Outside
from tests.support.stores import Files


class Dictionary:
    """The objects of a MemoryStore, straight from its dictionary."""

    def __init__(self, store: MemoryStore) -> None:
        self.objects = store.objects

    def read(self, path: str) -> bytes | None:
        stored = self.objects.get(path)
        return stored.data if stored else None

    def write(self, path: str, data: bytes) -> None:
        self.objects[path] = StoredObject(data, time.time(), crc32c.crc32c(data))


class TestLocalStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "run")

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Outside:
        return Files(tmp_path / "run")


class TestPatientStore(TestLocalStore):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return PatientStore(LocalStore(tmp_path / "run"))


class TestLocalStoreAroundThePageCache(TestLocalStore):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "run", direct_io=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no file system in memory")
class TestLocalStoreInMemory(StoreConformance):
    @pytest.fixture
    def root(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)

    @pytest.fixture
    def store(self, root: Path) -> Store:
        return LocalStore(root)

    @pytest.fixture
    def outside(self, root: Path) -> Outside:
        return Files(root)


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()

    @pytest.fixture
    def outside(self, store: MemoryStore) -> Outside:
        return Dictionary(store)


class TestFaultyStoreWithoutFaults(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return FaultyStore(MemoryStore())

    @pytest.fixture
    def outside(self, store: FaultyStore) -> Outside:
        assert isinstance(store.inner, MemoryStore)
        return Dictionary(store.inner)


class Overwrites(MemoryStore):
    def put_if_absent(self, path: str, data: bytes) -> None:
        self.replace(path, data)


class RefusesButOverwrites(MemoryStore):
    def put_if_absent(self, path: str, data: bytes) -> None:
        try:
            super().put_if_absent(path, data)
        except StorageError:
            self.replace(path, data)
            raise


class LooksThenWrites(MemoryStore):
    """As fsspec's mode="create" does on local files."""

    def put_if_absent(self, path: str, data: bytes) -> None:
        if self.stat(path) is None:
            time.sleep(0.002)
            self.replace(path, data)
        else:
            super().put_if_absent(path, data)


class ShowsHalf(MemoryStore):
    """As open(path, "xb") does."""

    def put_if_absent(self, path: str, data: bytes) -> None:
        super().put_if_absent(path, data[: len(data) // 2])
        time.sleep(0.002)
        self.replace(path, data)


class TornLooksWhole(MemoryStore):
    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        try:
            return super().put_unique(path, size, sections)
        except Exception:
            self.replace(path, bytes(size))
            raise


class WritesUniqueOver(MemoryStore):
    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        self.delete(path)
        return super().put_unique(path, size, sections)


class ListsFromCache(MemoryStore):
    def list(self, folder: str) -> Iterator[ObjectInfo]:
        cache = self.__dict__.setdefault("cache", {})
        if folder not in cache:
            cache[folder] = tuple(super().list(folder))
        return iter(cache[folder])


class ForgetsToDelete(MemoryStore):
    def delete(self, path: str) -> None:
        pass


class RaisesOnSecondDelete(MemoryStore):
    def delete(self, path: str) -> None:
        if path not in self.objects:
            raise ObjectNotFoundError(path)
        super().delete(path)


class ReadsShort(MemoryStore):
    def read(self, path: str, max_bytes: int) -> bytes:
        return super().read(path, max_bytes)[:10]


@pytest.mark.parametrize(
    "lying",
    [
        Overwrites,
        RefusesButOverwrites,
        LooksThenWrites,
        ListsFromCache,
        ForgetsToDelete,
        RaisesOnSecondDelete,
        ReadsShort,
    ],
)
def test_the_probe_refuses_a_store_that_breaks_a_promise(lying: type[MemoryStore]) -> None:
    store = lying()
    with pytest.raises(StoreUnsuitableError) as caught:
        probe(store)
    assert caught.value.path == store.url


@pytest.mark.parametrize(
    ("lying", "test"),
    [
        (Overwrites, StoreConformance.test_put_if_absent_creates_once),
        (Overwrites, StoreConformance.test_an_empty_object_is_created_once_too),
        (RefusesButOverwrites, StoreConformance.test_put_if_absent_sees_what_others_wrote),
        (LooksThenWrites, StoreConformance.test_of_many_creators_one_wins_and_readers_see_it_whole),
        (ShowsHalf, StoreConformance.test_of_many_creators_one_wins_and_readers_see_it_whole),
        (TornLooksWhole, StoreConformance.test_put_unique_torn_by_its_producer_leaves_no_whole_object),
        (WritesUniqueOver, StoreConformance.test_put_unique_never_touches_what_exists),
        (ForgetsToDelete, StoreConformance.test_delete),
        (ReadsShort, StoreConformance.test_objects_of_any_size_are_read_whole),
    ],
)
def test_the_kit_catches_a_store_that_breaks_a_promise(lying: type[MemoryStore], test: object) -> None:
    store = lying()
    with pytest.raises((AssertionError, StorageError, pytest.fail.Exception)):
        test(StoreConformance(), store, Dictionary(store))  # type: ignore[operator]


def test_the_kit_catches_listings_from_a_cache() -> None:
    with pytest.raises(AssertionError):
        StoreConformance().test_list_is_never_stale(ListsFromCache())


def test_the_probe_leaves_nothing_behind_and_touches_nothing_else(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("_log/1", b"entry")
    probe(store)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["_log", "_log/1"]


def test_probes_do_not_disturb_each_other(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            probe(LocalStore(tmp_path))
        except Exception as error:  # noqa: BLE001  collected, to be seen by the test
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == []


def test_a_name_means_one_memory_store_in_this_process() -> None:
    store = MemoryStore.named("test-storage/shared")
    store.put_if_absent("a", b"1")
    assert MemoryStore.named("test-storage/shared").read("a", 10) == b"1"
    assert list(MemoryStore.named("test-storage/other").list("")) == []
    assert MemoryStore().url != MemoryStore().url


def test_a_memory_store_keeps_the_time_of_its_clock_and_the_checksum_of_writing() -> None:
    store = MemoryStore(clock=lambda: 17.0)
    store.put_if_absent("a", b"content")
    info = store.stat("a")
    assert info == ObjectInfo("a", 7, 17.0, crc32c.crc32c(b"content"))
