"""Reading: exactly the wanted bytes come to their places, and never one that was not checked."""

from __future__ import annotations

import math
import random
import threading
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import DamagedError, ObjectNotFoundError, StorageError
from distckpt.format.arrow.index import Index
from distckpt.sharding.match import Wanted, match
from distckpt.storage import LocalStore, MemoryStore, Source, Store
from distckpt.transfer.reader import LOCAL, REMOTE, Pace, ReadStats, default_threads, pace_of, read_transfers
from tests.support.boxes import ITEM, chunks_of, part_of, slices, split
from tests.support.damage import flip
from tests.support.part import Part, examples
from tests.support.stored import Chunk, stored, value, whole

TINY = Pace(piece=8, small=5, gap=3, batch=16, threads=1)
"""Makes a few bytes go the ways of many megabytes."""


def read(
    store: Store, index: Index, wanted: Sequence[Wanted], threads: int = 1, pace: Pace | None = None, folder: str = "a"
) -> tuple[list[bytes], ReadStats]:
    transfers = match(index, wanted)
    targets = [np.full(size, 0x3F, np.uint8) for size in transfers.wanted_nbytes.tolist()]
    stats = read_transfers(store, folder, index, transfers, [target.data for target in targets], threads, pace)
    return [target.tobytes() for target in targets], stats


class WatchedStore(LocalStore):
    """Remembers what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sources: list[WatchedSource] = []
        self._lock = threading.Lock()

    def open(self, path: str) -> Source:
        source = WatchedSource(super().open(path), path)
        with self._lock:
            self.sources.append(source)
        return source

    @property
    def requests(self) -> list[tuple[int, int]]:
        return [request for source in self.sources for request in source.requests]


class WatchedSource:
    def __init__(self, source: Source, path: str) -> None:
        self._source = source
        self.path = path
        self.requests: list[tuple[int, int]] = []
        self.closed = 0

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, position: int, target: memoryview) -> None:
        self.requests.append((position, target.nbytes))
        self._source.read_into(position, target)

    def close(self) -> None:
        self.closed += 1
        self._source.close()


# ---- what is read ---------------------------------------------------------------------------------------------------


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=4),
    st.sampled_from(sorted(ITEM)),
    st.integers(0, 4),
    st.integers(1, 3),
    st.sampled_from([TINY, LOCAL, REMOTE, replace(TINY, small=0), replace(TINY, piece=1)]),
    st.randoms(use_true_random=False),
)
def test_any_rectangle_of_any_tiling(
    shapes: list[list[int]], item: int, cuts: int, threads: int, pace: Pace, rng: random.Random
) -> None:
    tensors = {
        f"t{n}": np.frombuffer(rng.randbytes(math.prod(shape) * item), np.uint8).reshape(*shape, item)
        for n, shape in enumerate(shapes)
    }
    chunks = [value("lr", b"0.125 "), value("names", b'["a"]', rank=1)]
    for key, tensor in tensors.items():
        boxes = split(((0,) * (tensor.ndim - 1), tensor.shape[:-1]), rng, cuts)
        chunks += chunks_of(key, tensor, boxes, item, rng)
    store = MemoryStore()
    index = stored(chunks, store)
    wanted = [Wanted(key, *part_of(tensor.shape[:-1], rng)) for key, tensor in tensors.items() for _ in range(2)]
    wanted += [Wanted("names", (), ()), Wanted("lr", (), ())]
    found, stats = read(store, index, wanted, threads, pace)
    expected = [tensors[one.key][slices((one.offset, one.length))].tobytes() for one in wanted[:-2]]
    assert found == [*expected, b'["a"]', b"0.125 "]
    assert stats.bytes_needed == sum(map(len, found))
    transfers = match(index, wanted)
    if transfers.direct.all() and not pace.small:
        most = transfers.nbytes + 2 * np.minimum(index.block, index.size)[transfers.row]
        assert stats.bytes_needed <= stats.bytes_read <= most.sum()


def big(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_in_several_shards(tmp_path: Path, threads: int) -> None:
    chunks = [whole(f"t{n}", big(n, n * 700_001), block=1 << 16, rank=n % 2, shard=n // 2 % 2) for n in range(6)]
    store = WatchedStore(tmp_path)
    index = stored(chunks, store)
    found, stats = read(store, index, [Wanted(chunk.key, (0,), chunk.length) for chunk in chunks], threads)
    assert found == [chunk.data for chunk in chunks]
    assert stats.bytes_read == stats.bytes_needed == sum(length for _, length in store.requests)
    shards = [f"a/{rank:05d}-{number}.arrow" for rank in (0, 1) for number in (0, 1)]
    assert sorted(source.path for source in store.sources) == shards
    assert [source.closed for source in store.sources] == [1] * 4


def test_a_lone_copy_has_no_folder_above_its_shards(tmp_path: Path) -> None:
    index = stored([whole("w", b"abc")], LocalStore(tmp_path), "attempt")
    assert read(LocalStore(tmp_path / "attempt"), index, [Wanted("w", (0,), (3,))], folder="")[0] == [b"abc"]


def test_a_part_takes_its_blocks_and_no_more(tmp_path: Path) -> None:
    """Rows of a matrix: at most one block more at either end, whatever part is wanted."""
    data = big(1, 4096 * 512)
    block = 16 * 512
    chunk = Chunk("w", data, "uint8", (4096, 512), (0, 0), (4096, 512), block=block)
    store = WatchedStore(tmp_path)
    index = stored([chunk], store)
    for first, count in [(0, 4096), (0, 16), (16, 32), (1, 1), (15, 2), (1000, 777), (4090, 6)]:
        store.sources.clear()
        found, stats = read(store, index, [Wanted("w", (first, 0), (count, 512))])
        assert found == [data[first * 512 : (first + count) * 512]]
        assert stats.bytes_needed == count * 512
        assert stats.bytes_read == sum(length for _, length in store.requests)
        assert stats.bytes_read <= stats.bytes_needed + 2 * block


def test_columns_take_each_block_once(tmp_path: Path) -> None:
    data = big(2, 1024 * 2048)
    chunk = Chunk("w", data, "float32", (1024, 512), (0, 0), (1024, 512), block=64 * 2048)
    store = WatchedStore(tmp_path)
    index = stored([chunk], store)
    expected = np.frombuffer(data, "<f4").reshape(1024, 512)[100:900, 7:300].tobytes()
    for threads in (1, 4):
        store.sources.clear()
        found, stats = read(store, index, [Wanted("w", (100, 7), (800, 293))], threads, replace(LOCAL, batch=300_000))
        assert found == [expected]
        assert stats.bytes_read == (900 // 64 + 1 - 100 // 64) * 64 * 2048


@pytest.mark.parametrize("rows", [90, 500])
def test_columns_of_a_stack_of_large_matrices_need_little_memory(rows: int) -> None:
    """One index of dimension 0 is larger than a piece: it goes through memory piece by piece all the same."""
    tensor = np.frombuffer(big(3, 3 * 512 * 2048 * 4), np.uint8).reshape(3, 512, 2048, 4)
    chunk = Chunk("w", tensor.tobytes(), "float32", (3, 512, 2048), (0, 0, 0), (3, 512, 2048))
    store = MemoryStore()
    index = stored([chunk], store)
    tracemalloc.start()
    try:
        found, stats = read(store, index, [Wanted("w", (1, 3, 5), (2, rows, 30))], pace=replace(LOCAL, piece=1 << 16))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [tensor[1:, 3 : 3 + rows, 5:35].tobytes()]
    assert stats.bytes_read == len(chunk.data)
    assert most < 3 << 20


def test_hundreds_of_small_tensors_are_read_together(tmp_path: Path) -> None:
    chunks = [Chunk(f"step{n}", n.to_bytes(4, "little"), "int32") for n in range(400)]
    store = WatchedStore(tmp_path)
    index = stored(chunks, store)
    found, stats = read(store, index, [Wanted(chunk.key, (), ()) for chunk in reversed(chunks)])
    assert found == [chunk.data for chunk in reversed(chunks)]
    assert len(store.requests) == 1
    assert stats.bytes_needed == 1600
    assert stats.bytes_read == store.requests[0][1] == index.position[-1] + 4 - index.position[0]


def test_small_tensors_far_apart_are_not(tmp_path: Path) -> None:
    chunks = [whole("a", b"1234"), whole("between", bytes(100_000)), whole("b", b"5678")]
    store = WatchedStore(tmp_path)
    index = stored(chunks, store)
    found, stats = read(store, index, [Wanted("a", (0,), (4,)), Wanted("b", (0,), (4,))])
    assert found == [b"1234", b"5678"]
    assert (len(store.requests), stats.bytes_read) == (2, 8)


def test_the_same_block_may_be_wanted_twice() -> None:
    store = MemoryStore()
    index = stored([whole("w", bytes(range(100)), block=64)], store)
    found, _ = read(store, index, [Wanted("w", (0,), (10,)), Wanted("w", (5,), (90,)), Wanted("w", (0,), (100,))])
    assert found == [bytes(range(10)), bytes(range(5, 95)), bytes(range(100))]


def test_an_object_store_is_asked_for_more_at_a_time(tmp_path: Path) -> None:
    assert pace_of(MemoryStore()) == REMOTE
    assert pace_of(LocalStore(tmp_path)) == LOCAL
    store = MemoryStore()
    index = stored([whole("w", bytes(3 << 20), block=1 << 16)], store)
    assert read(store, index, [Wanted("w", (0,), (3 << 20,))])[0] == [bytes(3 << 20)]


def test_threads_are_shared_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = default_threads()
    assert alone >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    assert default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert default_threads() == alone


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def test_what_is_not_covered_is_not_read() -> None:
    store = MemoryStore()
    index = stored([whole("w", b"abc")], store)
    with pytest.raises(ValueError, match="does not cover what is wanted of 'v'"):
        read(store, index, [Wanted("w", (0,), (3,)), Wanted("v", (0,), (3,))])


@pytest.mark.parametrize(
    "target",
    [
        memoryview(bytearray(2)),
        memoryview(bytearray(4)),
        memoryview(bytes(3)),
        memoryview(bytearray(6))[::2],
        memoryview(bytearray(3)).cast("b"),
        np.zeros((1, 3), np.uint8).data,
    ],
    ids=["short", "long", "read-only", "with gaps", "signed", "two dimensions"],
)
def test_memory_that_does_not_fit_is_refused(target: memoryview) -> None:
    store = MemoryStore()
    index = stored([whole("w", b"abc")], store)
    with pytest.raises(ValueError, match="memory of a wanted rectangle"):
        read_transfers(store, "a", index, match(index, [Wanted("w", (0,), (3,))]), [target])


def test_as_many_targets_as_rectangles() -> None:
    store = MemoryStore()
    index = stored([whole("w", b"abc")], store)
    with pytest.raises(ValueError, match="memory of a wanted rectangle"):
        read_transfers(store, "a", index, match(index, [Wanted("w", (0,), (3,))]), [])


# ---- damage ---------------------------------------------------------------------------------------------------------

MIXED = [
    whole("direct", big(4, 300), block=64),
    Chunk("small", b"1234", "int32"),
    value("lr", b"0.5  "),
    Chunk("matrix", big(5, 192), "float32", (6, 8), (0, 0), (6, 8), block=64),
]
PARTS = [
    Wanted("direct", (70,), (100,)),
    Wanted("small", (), ()),
    Wanted("lr", (), ()),
    Wanted("matrix", (1, 2), (4, 3)),
]
WHOLE = [Wanted(chunk.key, (0,) * len(chunk.shape), chunk.shape) for chunk in MIXED]


@pytest.mark.parametrize("pace", [LOCAL, replace(TINY, small=0)], ids=["together", "alone"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_flipped_byte_is_found_and_its_key_named(tmp_path: Path, pace: Pace, threads: int, part: Part) -> None:
    store = LocalStore(tmp_path)
    index = stored(MIXED, store)
    file = tmp_path / "a" / "00000-0.arrow"
    for row, chunk in enumerate(MIXED):
        begin = int(index.position[row])
        for place in part.of(range(begin, begin + len(chunk.data)), 3):
            flip(file, place)
            with pytest.raises(DamagedError, match="CRC32C is") as caught:
                read(store, index, WHOLE, threads, pace)
            assert (caught.value.path, caught.value.key) == (str(file), chunk.key)
            flip(file, place)
    assert read(store, index, WHOLE)[0] == [chunk.data for chunk in MIXED]


def damaged_key(store: Store, index: Index) -> str | None:
    try:
        read(store, index, PARTS)
    except DamagedError as error:
        return error.key
    return None


def test_a_part_is_hurt_by_its_own_blocks_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    index = stored(MIXED, store)
    touched = {"direct": range(64, 192), "small": range(4), "lr": range(5), "matrix": range(192)}
    file = tmp_path / "a" / "00000-0.arrow"
    for row, chunk in enumerate(MIXED):
        hurt = []
        for place in range(len(chunk.data)):
            flip(file, int(index.position[row]) + place)
            if damaged_key(store, index) == chunk.key:
                hurt.append(place)
            flip(file, int(index.position[row]) + place)
        assert hurt == list(touched[chunk.key])


@pytest.mark.parametrize("threads", [1, 2])
def test_every_cut_is_found_and_a_key_behind_it_named(tmp_path: Path, threads: int, part: Part) -> None:
    store = LocalStore(tmp_path)
    index = stored(MIXED, store)
    file = tmp_path / "a" / "00000-0.arrow"
    content = file.read_bytes()
    ends = (index.position + index.size).tolist()
    for length in [*part.of(range(0, max(ends), 7), 3), *(end - 1 for end in ends)]:
        file.write_bytes(content[:length])
        with pytest.raises(DamagedError) as caught:
            read(store, index, WHOLE, threads)
        assert caught.value.path == str(file)
        row = [chunk.key for chunk in MIXED].index(caught.value.key or "")
        assert ends[row] > length
    file.write_bytes(content[: max(ends)])
    assert read(store, index, WHOLE, threads)[0] == [chunk.data for chunk in MIXED]


def test_a_missing_shard_is_damage(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    index = stored([whole("a", b"x"), whole("b", b"y", rank=1)], store)
    store.delete("a/00001-0.arrow")
    with pytest.raises(DamagedError, match="the shard is missing") as caught:
        read(store, index, [Wanted("a", (0,), (1,)), Wanted("b", (0,), (1,))])
    assert (caught.value.path, caught.value.key) == (f"{tmp_path}/a/00001-0.arrow", "b")
    assert isinstance(caught.value.__cause__, ObjectNotFoundError)


def test_bytes_of_another_attempt_are_refused() -> None:
    """The same tensors, of the same sizes, at the same places: only the CRC tells them apart."""
    store = MemoryStore()
    index = stored([whole("w", b"old bytes")], store, "old")
    stored([whole("w", b"new bytes")], store, "new")
    with pytest.raises(DamagedError, match="CRC32C"):
        read(store, index, [Wanted("w", (0,), (9,))], folder="new")


class FailingSource(WatchedSource):
    """Fails for good somewhere in the middle."""

    def read_into(self, position: int, target: memoryview) -> None:
        if len(self.requests) > 1:
            raise StorageError(self.path, "connection lost")
        super().read_into(position, target)


class FailingStore(WatchedStore):
    def open(self, path: str) -> Source:
        source = FailingSource(LocalStore.open(self, path), path)
        self.sources.append(source)
        return source


@pytest.mark.parametrize("threads", [1, 4])
def test_a_store_that_fails_is_not_damage_and_every_shard_is_closed(tmp_path: Path, threads: int) -> None:
    chunks = [whole(f"t{n}", big(n, 1 << 20), block=1 << 16, rank=n % 3) for n in range(9)]
    index = stored(chunks, LocalStore(tmp_path))
    store = FailingStore(tmp_path)
    with pytest.raises(StorageError, match="connection lost"):
        read(store, index, [Wanted(chunk.key, (0,), chunk.length) for chunk in chunks], threads)
    assert store.sources
    assert all(source.closed == 1 for source in store.sources)


class SlowStore(WatchedStore):
    """Each request to it takes a while."""

    def open(self, path: str) -> Source:
        source = SlowSource(LocalStore.open(self, path), path)
        self.sources.append(source)
        return source


class SlowSource(WatchedSource):
    def read_into(self, position: int, target: memoryview) -> None:
        time.sleep(0.01)
        super().read_into(position, target)


def test_one_thread_that_finds_damage_stops_the_others(tmp_path: Path) -> None:
    chunks = [whole(f"t{n}", big(n, 100), rank=n) for n in range(60)]
    store = SlowStore(tmp_path)
    index = stored(chunks, store)
    store.delete("a/00001-0.arrow")
    with pytest.raises(DamagedError, match="the shard is missing"):
        read(store, index, [Wanted(chunk.key, (0,), (100,)) for chunk in chunks], threads=2)
    assert len(store.requests) < 30


def test_shards_are_not_all_open_at_once(tmp_path: Path) -> None:
    """A thousand ranks' shards must not need a thousand file descriptors."""

    class Counting(WatchedStore):
        most = 0

        def open(self, path: str) -> Source:
            source = super().open(path)
            self.most = max(self.most, sum(not one.closed for one in self.sources))
            return source

    chunks = [whole(f"t{n}", bytes([n]) * 10, rank=n) for n in range(50)]
    index = stored(chunks, LocalStore(tmp_path))
    store = Counting(tmp_path)
    read(store, index, [Wanted(chunk.key, (0,), (10,)) for chunk in chunks], threads=2)
    assert len(store.sources) == 50
    assert store.most <= 3
