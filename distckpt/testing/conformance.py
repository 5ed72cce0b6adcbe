"""What every store must do, as a class of pytest tests to inherit.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self): ...            # a new, empty store

        @pytest.fixture
        def outside(self, store): ...   # another way to the same objects, not through the store: see Outside

Other faults, such as a lost acknowledgement, are for ``distckpt.testing.faulty``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from distckpt.errors import AlreadyExistsError, DamagedError, ObjectNotFoundError
from distckpt.storage.interface import Source, Store
from distckpt.storage.probe import probe
from distckpt.testing.observing import MIB, MOST, Outside, Watching, everything, pattern, race, sections_of, winners

WRITERS = 16
ROUNDS = 4

BAD_PATHS = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", ".hidden", "a\\b", "a\0b", "a\nb"]
BAD_FOLDERS = ["/", "/a", "a/", "a//b", "..", "a/../b", "a\\b", "a\0b"]


class StoreConformance:
    """The tests. A subclass provides the fixtures ``store``, new and empty, and ``outside``, an Outside view of it."""

    def test_probe_accepts_it_and_leaves_nothing(self, store: Store) -> None:
        probe(store)
        assert everything(store) == {}

    def test_put_if_absent_creates_once(self, store: Store, outside: Outside) -> None:
        store.put_if_absent("log/1", b"first")
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent("log/1", b"second")
        assert outside.read("log/1") == b"first"

    def test_put_if_absent_sees_what_others_wrote(self, store: Store, outside: Outside) -> None:
        outside.write("log/1", b"theirs")
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent("log/1", b"ours")
        assert outside.read("log/1") == b"theirs"

    def test_an_empty_object_is_created_once_too(self, store: Store, outside: Outside) -> None:
        store.put_if_absent("marker", b"")
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent("marker", b"not empty")
        assert outside.read("marker") == b""
        assert store.read("marker", 0) == b""

    def test_of_many_creators_one_wins_and_readers_see_it_whole(self, store: Store, outside: Outside) -> None:
        for number in range(ROUNDS):
            path = f"race/{number}"
            contents = [bytes([writer]) * (256 << 10) + path.encode() for writer in range(WRITERS)]
            seen, won = race(store, path, contents)
            assert len(won) == 1, f"{len(won)} of {WRITERS} writers were told that they had won"
            assert outside.read(path) == won[0], "the object is not what its winner wrote"
            assert seen <= {won[0]}, "a reader saw something else than what the winner wrote"

    def test_put_unique_of_many_creators_one_wins(self, store: Store, outside: Outside) -> None:
        contents = [bytes([writer]) * MIB for writer in range(WRITERS)]

        def put(content: bytes) -> None:
            store.put_unique("race/large", MIB, [memoryview(content)])

        won = winners(put, contents)
        assert len(won) == 1
        assert outside.read("race/large") == won[0]

    @pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 4095, 3 * MIB + 4096])
    def test_put_unique_writes_all_sections(self, store: Store, outside: Outside, size: int) -> None:
        data = pattern(size)
        info = store.put_unique("ckpt-1/e1/0.arrow", size, sections_of(data, MIB))
        assert (info.path, info.size) == ("ckpt-1/e1/0.arrow", size)
        assert outside.read("ckpt-1/e1/0.arrow") == data
        stat = store.stat("ckpt-1/e1/0.arrow")
        assert stat is not None
        assert (stat.path, stat.size, stat.crc32c) == (info.path, info.size, info.crc32c)

    def test_put_unique_takes_sections_of_different_lengths(self, store: Store, outside: Outside) -> None:
        data = pattern(6 * MIB + 17)
        view = memoryview(data)
        cuts = [view[:MIB], view[MIB:MIB], view[MIB : 5 * MIB], view[5 * MIB : 6 * MIB], view[6 * MIB :]]
        store.put_unique("cuts", len(data), cuts)
        assert outside.read("cuts") == data

    def test_put_unique_serves_a_producer_that_makes_sections_as_they_are_wanted(
        self, store: Store, outside: Outside
    ) -> None:
        data = pattern(7 * MIB + 5)
        made = (memoryview(bytes(section)) for section in sections_of(data, MIB))
        store.put_unique("produced", len(data), made)
        assert outside.read("produced") == data

    def test_put_unique_never_touches_what_exists(self, store: Store, outside: Outside) -> None:
        outside.write("large", b"theirs")
        with pytest.raises(AlreadyExistsError):
            store.put_unique("large", MIB, [memoryview(bytes(MIB))])
        assert outside.read("large") == b"theirs"

    def test_put_unique_torn_by_its_producer_leaves_no_whole_object(self, store: Store, outside: Outside) -> None:
        data = pattern(4 * MIB)

        def produce() -> Iterator[memoryview]:
            yield from list(sections_of(data, MIB))[:3]
            raise _ProducerFailed

        with pytest.raises(_ProducerFailed):
            store.put_unique("torn", len(data), produce())
        _assert_not_whole(store, outside, "torn", len(data))

    @pytest.mark.parametrize("announced", [MIB - 1, 2 * MIB - 1, 2 * MIB + 1, 3 * MIB])
    def test_put_unique_refuses_sections_of_another_sum(self, store: Store, outside: Outside, announced: int) -> None:
        with pytest.raises(ValueError, match="section"):
            store.put_unique("sum", announced, [memoryview(bytes(MIB)), memoryview(bytes(MIB))])
        _assert_not_whole(store, outside, "sum", announced)

    def test_put_unique_refuses_an_odd_section_that_is_not_the_last(self, store: Store, outside: Outside) -> None:
        with pytest.raises(ValueError, match="multiple"):
            store.put_unique("odd", MIB + 8, [memoryview(bytes(8)), memoryview(bytes(MIB))])
        _assert_not_whole(store, outside, "odd", MIB + 8)

    def test_replace_writes_over(self, store: Store, outside: Outside) -> None:
        store.replace("leases/a", b"new")
        assert outside.read("leases/a") == b"new"
        store.replace("leases/a", b"newer and longer")
        assert outside.read("leases/a") == b"newer and longer"
        store.replace("leases/a", b"")
        assert outside.read("leases/a") == b""

    def test_a_reader_sees_one_of_the_replacements_whole(self, store: Store) -> None:
        contents = [bytes([number]) * (64 << 10) for number in range(8)]
        store.replace("checkpoint", contents[0])
        with Watching(store, "checkpoint") as seen:
            for content in contents:
                store.replace("checkpoint", content)
        assert seen <= set(contents)

    def test_read_gives_what_others_wrote(self, store: Store, outside: Outside) -> None:
        outside.write("a/b", b"one")
        assert store.read("a/b", MOST) == b"one"
        outside.write("a/b", b"two")
        assert store.read("a/b", MOST) == b"two", "the read came from a cache"

    def test_objects_of_any_size_are_read_whole(self, store: Store, outside: Outside) -> None:
        for size in (0, 1, 4096, 5 * MIB + 3):
            data = pattern(size)
            outside.write("a", data)
            assert store.read("a", MOST) == data

    def test_read_refuses_more_than_the_cap(self, store: Store, outside: Outside) -> None:
        outside.write("a", b"12345")
        assert store.read("a", 5) == b"12345"
        with pytest.raises(DamagedError):
            store.read("a", 4)

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        for missing in ("nothing", "no/such/thing"):
            with pytest.raises(ObjectNotFoundError):
                store.read(missing, MOST)
            with pytest.raises(ObjectNotFoundError):
                store.open(missing)
            assert store.stat(missing) is None
            assert list(store.list(missing)) == []
            assert list(store.folders(missing)) == []

    def test_a_folder_is_no_object(self, store: Store, outside: Outside) -> None:
        outside.write("folder/object", b"x")
        assert store.stat("folder") is None
        with pytest.raises(ObjectNotFoundError):
            store.read("folder", MOST)

    def test_ranges(self, store: Store, outside: Outside) -> None:
        data = pattern(3 * MIB + 11)
        outside.write("ranged", data)
        source = store.open("ranged")
        assert source.size == len(data)
        for start, length in [(0, 0), (0, 1), (5, 4096), (MIB - 1, MIB + 2), (len(data) - 1, 1), (0, len(data))]:
            assert _read_range(source, start, length) == data[start : start + length]
        source.close()
        source.close()

    def test_a_range_past_the_end_is_damage(self, store: Store, outside: Outside) -> None:
        outside.write("short", b"12345")
        source = store.open("short")
        for start, length in [(0, 6), (5, 1), (100, 1)]:
            with pytest.raises(DamagedError):
                source.read_into(start, memoryview(bytearray(length)))
        with pytest.raises(ValueError, match="negative"):
            source.read_into(-1, memoryview(bytearray(1)))
        source.close()

    def test_concurrent_ranges(self, store: Store, outside: Outside) -> None:
        data = pattern(4 * MIB)
        outside.write("ranged", data)
        source = store.open("ranged")
        starts = [(number * 99991) % (3 * MIB) for number in range(200)]
        with ThreadPoolExecutor(8) as pool:
            pieces = list(pool.map(lambda start: _read_range(source, start, 65537), starts))
        source.close()
        assert pieces == [data[start : start + 65537] for start in starts]

    def test_list_and_folders_show_at_once_what_is_there(self, store: Store, outside: Outside) -> None:
        assert everything(store) == {}
        store.put_if_absent("top", b"1")
        store.put_if_absent("log/1", b"22")
        store.put_unique("ckpt-1/e1/0.arrow", 3, [memoryview(b"333")])
        outside.write("ckpt-1/e1/1.arrow", b"4444")
        outside.write("ckpt-10/e2/0.arrow", b"55555")
        outside.write("log/folder/2", b"666666")
        assert _sizes(store, "") == {"top": 1}
        assert _sizes(store, "log") == {"log/1": 2}
        assert _sizes(store, "ckpt-1") == {}
        assert _sizes(store, "ckpt-1/e1") == {"ckpt-1/e1/0.arrow": 3, "ckpt-1/e1/1.arrow": 4}
        assert sorted(store.folders("")) == ["ckpt-1", "ckpt-10", "log"]
        assert list(store.folders("ckpt-1")) == ["e1"]
        assert list(store.folders("ckpt-1/e1")) == []

    def test_list_is_never_stale(self, store: Store) -> None:
        for number in range(5):
            store.put_if_absent(f"log/{number}", b"x")
            assert f"log/{number}" in _sizes(store, "log")
        for number in range(5):
            store.delete(f"log/{number}")
            assert f"log/{number}" not in _sizes(store, "log")

    def test_list_copes_with_deletes_meanwhile(self, store: Store) -> None:
        paths = [f"folder/{number}" for number in range(30)]
        for path in paths:
            store.replace(path, b"x")
        listing = store.list("folder")
        first = next(listing)
        with ThreadPoolExecutor(2) as pool:
            deleting = [pool.submit(store.delete, path) for path in paths]
            rest = list(listing)
        assert {info.path for info in [first, *rest]} <= set(paths)
        assert [task.exception() for task in deleting] == [None] * len(paths)
        assert everything(store) == {}

    def test_stat(self, store: Store, outside: Outside) -> None:
        store.put_if_absent("a/b", b"12345")
        info = store.stat("a/b")
        assert info is not None
        assert (info.path, info.size) == ("a/b", 5)
        assert info.modified > 0
        assert list(store.list("a")) in ([info], [replace(info, crc32c=None)]), "a listing need not have checksums"
        outside.write("a/c", b"1")
        outside.write("a/c", b"123")
        again = store.stat("a/c")
        assert again is not None
        assert again.size == 3

    def test_delete(self, store: Store, outside: Outside) -> None:
        store.put_if_absent("ckpt-1/e1/manifest.json", b"x")
        store.put_if_absent("ckpt-1/e1/index.arrow", b"y")
        store.delete("ckpt-1/e1/manifest.json")
        store.delete("ckpt-1/e1/manifest.json")
        store.delete("never/was/there")
        assert outside.read("ckpt-1/e1/manifest.json") is None
        assert outside.read("ckpt-1/e1/index.arrow") == b"y"

    def test_a_folder_goes_with_its_last_object(self, store: Store) -> None:
        store.put_if_absent("ckpt-1/e1/manifest.json", b"x")
        store.put_if_absent("ckpt-2/e1/manifest.json", b"x")
        store.delete("ckpt-1/e1/manifest.json")
        assert list(store.folders("")) == ["ckpt-2"]

    def test_writers_and_deleters_of_one_folder_do_not_hinder_each_other(self, store: Store) -> None:
        def renew(worker: int) -> None:
            for number in range(10):
                store.put_if_absent(f"leases/{worker}-{number}", b"x")
                store.delete(f"leases/{worker}-{number}")

        with ThreadPoolExecutor(8) as pool:
            results = [pool.submit(renew, worker) for worker in range(8)]
        assert [result.exception() for result in results] == [None] * 8
        assert everything(store) == {}

    @pytest.mark.parametrize("path", BAD_PATHS)
    def test_bad_paths_are_refused(self, store: Store, path: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.put_if_absent(path, b"x"),
            lambda: store.put_unique(path, 1, [memoryview(b"x")]),
            lambda: store.replace(path, b"x"),
            lambda: store.read(path, MOST),
            lambda: store.open(path),
            lambda: store.stat(path),
            lambda: store.delete(path),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="path"):
                call()

    @pytest.mark.parametrize("folder", BAD_FOLDERS)
    def test_bad_folders_are_refused(self, store: Store, folder: str) -> None:
        with pytest.raises(ValueError, match="path"):
            list(store.list(folder))
        with pytest.raises(ValueError, match="path"):
            list(store.folders(folder))


class _ProducerFailed(Exception):
    pass


def _read_range(source: Source, start: int, length: int) -> bytes:
    target = bytearray(length)
    source.read_into(start, memoryview(target))
    return bytes(target)


def _sizes(store: Store, folder: str) -> dict[str, int]:
    return {info.path: info.size for info in store.list(folder)}


def _assert_not_whole(store: Store, outside: Outside, path: str, size: int) -> None:
    left = outside.read(path)
    assert left is None or len(left) < size, "a torn write left an object of full size"
    info = store.stat(path)
    assert info is None or info.size < size, "a torn write is said to have left an object of full size"
