"""How large objects reach a local disk: round the page cache or through it, section by section."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.storage import LocalStore
from distckpt.testing.observing import MIB, aligned, files_below, pattern, sections_of


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each pwrite: whether it was to go round the page cache, and how many bytes it was to write."""
    seen: list[tuple[bool, int]] = []
    pwrite = os.pwrite

    def recording(fd: int, data: memoryview, position: int) -> int:
        seen.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", recording)
    return seen


def has_direct_io(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("tail", [0, 1, 4095, 4096, 5000])
def test_aligned_memory_goes_round_the_page_cache(
    tmp_path: Path, direct_writes: list[tuple[bool, int]], tail: int
) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    data = pattern(3 * MIB + tail)
    LocalStore(tmp_path, direct_io=True).put_unique("large", len(data), sections_of(aligned(data), MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert sum(count for is_direct, count in direct_writes if is_direct) == len(data) // 4096 * 4096
    assert sum(count for is_direct, count in direct_writes if not is_direct) == len(data) % 4096


def test_unaligned_memory_goes_through_the_page_cache(tmp_path: Path, direct_writes: list[tuple[bool, int]]) -> None:
    data = pattern(3 * MIB)
    shifted = aligned(b"x" + data)[1:]
    LocalStore(tmp_path, direct_io=True).put_unique("large", len(data), sections_of(shifted, MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert not any(is_direct for is_direct, _ in direct_writes)


def test_aligned_and_unaligned_sections_mix(tmp_path: Path) -> None:
    data = pattern(6 * MIB + 100)
    shifted = aligned(b"x" + data)[1:]
    straight = aligned(data)
    sections = [(shifted, straight)[number % 2][number * MIB : (number + 1) * MIB] for number in range(7)]
    LocalStore(tmp_path, direct_io=True).put_unique("large", len(data), sections)
    assert (tmp_path / "large").read_bytes() == data


def test_direct_io_can_be_switched_off(tmp_path: Path, direct_writes: list[tuple[bool, int]]) -> None:
    data = pattern(MIB)
    LocalStore(tmp_path, direct_io=False).put_unique("large", len(data), [aligned(data)])
    assert (tmp_path / "large").read_bytes() == data
    assert not any(is_direct for is_direct, _ in direct_writes)


def test_a_file_system_without_direct_io_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_writes: list[tuple[bool, int]]
) -> None:
    system = fcntl.fcntl

    def refusing(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return system(fd, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    data = pattern(3 * MIB + 5)
    LocalStore(tmp_path, direct_io=True).put_unique("large", len(data), sections_of(aligned(data), MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert not any(is_direct for is_direct, _ in direct_writes)


def test_a_device_with_a_coarser_alignment_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    pwrite = os.pwrite
    refused: list[int] = []

    def demanding(fd: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(position)
            raise OSError(errno.EINVAL, "not aligned enough")
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", demanding)
    data = pattern(3 * MIB + 5)
    LocalStore(tmp_path, direct_io=True).put_unique("large", len(data), sections_of(aligned(data), MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert refused == [0]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def short(fd: int, data: memoryview, position: int) -> int:
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        assert not is_direct or position % 4096 == len(data) % 4096 == 0
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        written = pwrite(fd, data[:70_001], position)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | (os.O_DIRECT if is_direct else 0))
        return written

    monkeypatch.setattr(os, "pwrite", short)
    data = pattern(2 * MIB + 5)
    store = LocalStore(tmp_path, direct_io=True)
    store.put_unique("large", len(data), sections_of(aligned(data), MIB))
    store.put_if_absent("small", data)
    assert (tmp_path / "large").read_bytes() == data
    assert (tmp_path / "small").read_bytes() == data


def test_a_section_is_written_while_the_next_is_produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    producing = threading.Event()
    overlapped: list[bool] = []

    def waiting(fd: int, data: memoryview, position: int) -> int:
        if position == 0:
            overlapped.append(producing.wait(10))
        return pwrite(fd, data, position)

    def produce() -> Iterator[memoryview]:
        yield aligned(bytes(MIB))
        producing.set()
        yield aligned(bytes(MIB))

    monkeypatch.setattr(os, "pwrite", waiting)
    LocalStore(tmp_path).put_unique("large", 2 * MIB, produce())
    assert overlapped == [True]


def test_nothing_is_being_written_any_more_when_a_producer_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    begun = threading.Event()
    ended: list[int] = []

    def slow(fd: int, data: memoryview, position: int) -> int:
        begun.set()
        time.sleep(0.05)
        written = pwrite(fd, data, position)
        ended.append(written)
        return written

    def produce() -> Iterator[memoryview]:
        yield memoryview(bytes(MIB))
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(KeyboardInterrupt):
        LocalStore(tmp_path).put_unique("torn", 2 * MIB, produce())
    assert ended == [MIB]
    assert files_below(tmp_path) == set()


def test_a_large_write_works_when_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refusing)
    data = pattern(3 * MIB)
    LocalStore(tmp_path).put_unique("large", len(data), sections_of(data, MIB))
    assert (tmp_path / "large").read_bytes() == data


def test_a_producer_that_raises_an_os_error_gets_it_back_unchanged(tmp_path: Path) -> None:
    mine = OSError(errno.ENOSPC, "of the producer")

    def produce() -> Iterator[memoryview]:
        yield memoryview(bytes(MIB))
        raise mine

    with pytest.raises(OSError, match="of the producer") as caught:
        LocalStore(tmp_path).put_unique("torn", 2 * MIB, produce())
    assert caught.value is mine
    assert files_below(tmp_path) == set()
