"""A cache of downloads: what is fetched once, what is fetched again, and who makes room for whom."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.storage import MemoryStore, Store, open_store
from distckpt.storage.cache import BLOCK_BYTES, BlockCache
from distckpt.storage.cached import CachedStore
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import MIB, Outside, pattern
from tests.support.mounts import small_disk

ATTEMPT = f"ckpt-1/e1-{'0' * 32}"
SHARD = f"{ATTEMPT}/00000-0.arrow"
SIZE = 2 * BLOCK_BYTES + 5 * MIB + 123


class Counting(MemoryStore):
    """Counts the bytes that are read of each object."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.ranges: list[tuple[int, int]] = []
        self.whole: list[str] = []

    def read(self, path: str, max_bytes: int) -> bytes:
        self.whole.append(path)
        return super().read(path, max_bytes)

    def open(self, path: str) -> Counted:
        return Counted(super().open(path), self.ranges)


class Counted:
    def __init__(self, inner: object, ranges: list[tuple[int, int]]) -> None:
        self._inner, self._ranges = inner, ranges

    @property
    def size(self) -> int:
        return self._inner.size  # type: ignore[attr-defined,no-any-return]

    def read_into(self, position: int, target: memoryview) -> None:
        self._ranges.append((position, target.nbytes))
        self._inner.read_into(position, target)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._inner.close()  # type: ignore[attr-defined]


@pytest.fixture
def inner() -> Counting:
    store = Counting()
    put(store, SHARD, SIZE)
    return store


def put(store: Store, path: str, size: int) -> bytes:
    data = pattern(size)
    store.put_unique(path, size, [memoryview(data)])
    return data


def read(store: Store, path: str, begin: int, end: int) -> bytes:
    source = store.open(path)
    target = bytearray(end - begin)
    source.read_into(begin, memoryview(target))
    source.close()
    return bytes(target)


def files(cache: BlockCache) -> list[Path]:
    return sorted(path for path in Path(cache.folder).rglob("*") if path.is_file() and path.name != "usage")


class TestCachedStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return CachedStore(MemoryStore(), BlockCache(str(tmp_path / "cache")))

    @pytest.fixture
    def outside(self, store: CachedStore) -> Outside:
        return _Inside(store._inner)  # type: ignore[arg-type]


class _Inside:
    def __init__(self, inner: MemoryStore) -> None:
        self._inner = inner

    def read(self, path: str) -> bytes | None:
        found = self._inner.objects.get(path)
        return None if found is None else found.data

    def write(self, path: str, data: bytes) -> None:
        self._inner.replace(path, data)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (0, SIZE),
        (5, 17),
        (BLOCK_BYTES - 3, BLOCK_BYTES + 3),
        (MIB - 1, 3 * MIB + 1),
        (SIZE - 1, SIZE),
        (7, 7),
        (SIZE, SIZE),
    ],
)
def test_only_the_blocks_of_a_range_are_fetched_and_once(begin: int, end: int, inner: Counting, tmp_path: Path) -> None:
    for _ in range(3):
        store = CachedStore(inner, BlockCache(str(tmp_path)))
        assert read(store, SHARD, begin, end) == pattern(SIZE)[begin:end]
    blocks = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)) if begin < end else ()
    wanted = [(number * BLOCK_BYTES, min(BLOCK_BYTES, SIZE - number * BLOCK_BYTES)) for number in blocks]
    assert inner.ranges == wanted


def test_what_can_change_is_never_kept_and_what_was_deleted_is_not_there(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path))
    store = CachedStore(inner, cache)
    for path in ("_log/00000000000000000001.json", "_leases/a.json", "checkpoint", f"{ATTEMPT}/manifest.json"):
        store.put_if_absent(path, b"1")
        assert store.read(path, 9) == read(store, path, 0, 1) == b"1"
        inner.replace(path, b"2")
        assert store.read(path, 9) == read(store, path, 0, 1) == b"2"
    assert files(cache) == []
    read(store, SHARD, 0, SIZE)
    store.delete(SHARD)
    with pytest.raises(ObjectNotFoundError):
        store.open(SHARD)


def test_an_index_is_read_from_the_cache_if_it_is_what_the_store_says_it_is(inner: Counting, tmp_path: Path) -> None:
    index = f"{ATTEMPT}/index.arrow"
    store = CachedStore(inner, BlockCache(str(tmp_path)))
    store.put_if_absent(index, b"an index")
    assert [store.read(index, 8) for _ in range(2)] == [b"an index"] * 2
    assert (inner.whole, inner.ranges) == ([], [(0, 8)])
    inner.objects[index] = type(inner.objects[index])(b"no index", 0.0, inner.objects[index].crc32c)
    assert store.read(index, 8) == b"an index"  # of a name that is used once there is one content
    with pytest.raises(DamagedError):
        store.read(index, 7)


@pytest.mark.parametrize("where", [0, MIB + 1, BLOCK_BYTES - 1, BLOCK_BYTES + 1, -1])
def test_a_block_that_is_not_as_it_was_kept_is_fetched_again(
    where: int, inner: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlockCache(str(tmp_path))
    store = CachedStore(inner, cache)
    read(store, SHARD, 0, SIZE)
    damaged = files(cache)[0]
    data = bytearray(damaged.read_bytes())
    data[where] ^= 1
    damaged.write_bytes(data)
    inner.ranges.clear()
    assert read(store, SHARD, 0, SIZE) == pattern(SIZE)
    assert inner.ranges == [(0, BLOCK_BYTES)]
    assert "is fetched again" in caplog.text
    for change in (lambda: damaged.write_bytes(b""), lambda: damaged.write_bytes(bytes(data) + b"1"), damaged.unlink):
        change()
        assert read(store, SHARD, 0, SIZE) == pattern(SIZE)


def test_what_came_damaged_over_the_wire_is_not_kept_once_it_is_noticed(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path))
    store, good = CachedStore(inner, cache), inner.objects[SHARD]
    inner.objects[SHARD] = type(good)(bytes(SIZE), 0.0, 0)
    assert read(store, SHARD, 0, 100) == bytes(100)
    inner.objects[SHARD] = good
    assert read(store, SHARD, 0, 100) == bytes(100)
    store.cool(SHARD)
    assert files(cache) == []
    assert read(store, SHARD, 0, 100) == read(CachedStore(inner, cache), SHARD, 0, 100) == pattern(SIZE)[:100]
    store.cool(f"{ATTEMPT}/00009-0.arrow")
    assert len(list(Path(cache.folder).iterdir())) == 2  # the object, and how much there is


def test_a_cache_holds_no_more_than_it_may_and_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    limit = 4 * (BLOCK_BYTES + 1024)
    inner, cache = Counting(), BlockCache(str(tmp_path), limit)
    store = CachedStore(inner, cache)
    paths = [f"{ATTEMPT}/{number:05}-0.arrow" for number in range(8)]
    for number, path in enumerate(paths):
        put(inner, path, BLOCK_BYTES)
        read(store, path, 0, BLOCK_BYTES)
        read(store, paths[0], 0, 1)  # stays, as it is in use all the time
        for one in files(cache):  # time goes on
            os.utime(one, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns - 10**9))
        assert sum(one.stat().st_size for one in files(cache)) <= limit, number
    inner.ranges.clear()
    for path in (paths[0], paths[7], paths[6]):
        read(store, path, 0, BLOCK_BYTES)
    assert inner.ranges == []
    read(store, paths[1], 0, BLOCK_BYTES)
    assert inner.ranges == [(0, BLOCK_BYTES)]


def test_what_is_open_is_not_deleted_and_who_finds_no_room_reads_on_without(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 2 * (BLOCK_BYTES + 1024))
    other = f"{ATTEMPT}/00001-0.arrow"
    store, data = CachedStore(inner, cache), put(inner, other, SIZE)
    source = store.open(SHARD)
    target = bytearray(2 * BLOCK_BYTES)
    source.read_into(0, memoryview(target))
    kept = files(cache)
    assert read(store, other, 0, SIZE) == data
    assert files(cache) == kept
    source.close()
    assert read(CachedStore(inner, BlockCache(str(tmp_path), 2 * (BLOCK_BYTES + 1024))), other, 0, SIZE) == data
    assert files(cache) != kept


def test_a_full_disk_is_said_once_and_reading_goes_on(
    inner: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "12m") as disk:
        cache = BlockCache(str(disk))
        for _ in range(3):
            assert read(CachedStore(inner, cache), SHARD, 0, SIZE) == pattern(SIZE)
        assert [path.name for path in files(cache)] == ["0"]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "takes no more" in caplog.text


def test_a_cache_may_be_deleted_at_any_time(inner: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = BlockCache(str(tmp_path / "cache"))
    store = CachedStore(inner, cache)
    source, target = store.open(SHARD), bytearray(SIZE)
    source.read_into(0, memoryview(target)[:5])
    shutil.rmtree(tmp_path / "cache")
    source.read_into(0, memoryview(target))
    assert target == pattern(SIZE)
    for _ in range(2):
        assert read(store, SHARD, 0, SIZE) == pattern(SIZE)
    assert [path.name for path in files(cache)] == ["0", "1", "2"]
    assert caplog.text == ""


def test_a_folder_that_others_may_enter_is_no_cache(
    inner: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / f"distckpt-{os.geteuid()}"
    theirs.mkdir()
    theirs.chmod(0o770)
    store = CachedStore(inner, BlockCache(str(tmp_path)))
    assert read(store, SHARD, 0, SIZE) == pattern(SIZE)
    assert list(theirs.iterdir()) == []
    assert "yours alone" in caplog.text
    theirs.rmdir()
    theirs.symlink_to(tmp_path)
    assert BlockCache(str(tmp_path)).entry("a") is None
    theirs.unlink()
    made = BlockCache(str(tmp_path))
    assert made.entry("a") is not None
    assert {oct(path.stat().st_mode & 0o777) for path in (theirs, *theirs.iterdir())} == {"0o700"}


def test_threads_that_want_the_same_block_wait_for_the_one_who_fetches_it(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path))
    found: list[bytes] = []

    def want() -> None:
        found.append(read(CachedStore(inner, cache), SHARD, 0, SIZE))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [pattern(SIZE)] * 8
    assert len(inner.ranges) == 3


def test_who_died_while_he_fetched_leaves_no_lock_and_no_block(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path))
    assert cache.entry(f"{inner.url}/{SHARD}") is not None
    folder = next(path for path in Path(cache.folder).iterdir() if path.is_dir())
    child = os.fork()
    if not child:
        part = os.open(folder / "0.part", os.O_RDWR | os.O_CREAT)
        fcntl.flock(part, fcntl.LOCK_EX)
        os.write(part, b"half of it")
        os._exit(0)
    os.waitpid(child, 0)
    store = CachedStore(inner, cache)
    assert read(store, SHARD, 0, SIZE) == read(store, SHARD, 0, SIZE) == pattern(SIZE)
    assert len(inner.ranges) == 3
    assert [path.name for path in files(cache)] == ["0", "1", "2"]


def test_if_fetching_fails_the_next_one_fetches(inner: Counting, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path))
    entry = cache.entry("a")
    assert entry is not None

    def fail(_: memoryview) -> None:
        raise DamagedError("a", "cannot be read")

    target = memoryview(bytearray(3))
    with pytest.raises(DamagedError):
        entry.read(0, 3, 0, target, fail)
    assert files(cache) == []
    entry.read(0, 3, 0, target, lambda whole: whole.__setitem__(slice(None), b"abc"))
    entry.read(0, 3, 0, target, fail)
    assert bytes(target) == b"abc"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    def open_with(**options: object) -> Store:
        return open_store("memory://cached-or-not", options)

    yield open_with
    MemoryStore._named.pop("cached-or-not", None)


def test_options_and_environment_say_where_and_how_much(
    opened: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(opened(), SHARD, 100)

    def is_kept(folder: str) -> bool:
        return any((tmp_path / folder).rglob("0"))

    read(opened(), SHARD, 0, 100)
    read(opened(cache_dir=tmp_path / "a"), SHARD, 0, 100)
    monkeypatch.setenv("DISTCKPT_CACHE_DIR", str(tmp_path / "b"))
    read(opened(cache_dir=None), SHARD, 0, 100)
    assert (is_kept("a"), is_kept("b")) == (True, False)
    read(opened(), SHARD, 0, 100)
    assert is_kept("b")
    read(opened(cache_dir=tmp_path / "c", cache_bytes=50), SHARD, 0, 100)
    monkeypatch.setenv("DISTCKPT_CACHE_BYTES", "60")
    read(opened(cache_dir=tmp_path / "c"), SHARD, 0, 100)
    assert not is_kept("c")
    for wrong in (-1, "much", 0.5):
        with pytest.raises(ValueError, match="cache_bytes is a number of bytes"):
            opened(cache_bytes=wrong)
    caplog.clear()
    open_store(tmp_path, {})
    assert caplog.text == ""
    for _ in range(2):
        open_store(tmp_path, {"cache_dir": tmp_path / "d"})
    assert caplog.text.count("is read as it is") == 1
    assert not (tmp_path / "d").exists()
