"""The local store when the disk is full, the folder is gone, links are planted, or the system call fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import (
    AlreadyExistsError,
    DistckptError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
)
from distckpt.storage import LocalStore, probe
from distckpt.testing.conformance import MIB, pattern, sections_of


def files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


# How large objects reach the disk


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each pwrite: whether it went round the page cache, and how many bytes it wrote."""
    seen: list[tuple[bool, int]] = []
    pwrite = os.pwrite

    def recording(fd: int, data: memoryview, position: int) -> int:
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        written = pwrite(fd, data, position)
        seen.append((is_direct, written))
        return written

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
    LocalStore(tmp_path).put_unique("large", len(data), sections_of(aligned(data), MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert sum(count for is_direct, count in direct_writes if is_direct) == len(data) // 4096 * 4096
    assert sum(count for is_direct, count in direct_writes if not is_direct) == len(data) % 4096


def test_unaligned_memory_goes_through_the_page_cache(tmp_path: Path, direct_writes: list[tuple[bool, int]]) -> None:
    data = pattern(3 * MIB)
    shifted = aligned(b"x" + data)[1:]
    LocalStore(tmp_path).put_unique("large", len(data), sections_of(shifted, MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert not any(is_direct for is_direct, _ in direct_writes)


def test_aligned_and_unaligned_sections_mix(tmp_path: Path) -> None:
    data = pattern(6 * MIB + 100)
    shifted = aligned(b"x" + data)[1:]
    straight = aligned(data)
    sections = [(shifted, straight)[number % 2][number * MIB : (number + 1) * MIB] for number in range(7)]
    LocalStore(tmp_path).put_unique("large", len(data), sections)
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
    LocalStore(tmp_path).put_unique("large", len(data), sections_of(aligned(data), MIB))
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
    LocalStore(tmp_path).put_unique("large", len(data), sections_of(aligned(data), MIB))
    assert (tmp_path / "large").read_bytes() == data
    assert refused == [0]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:70_001], position))
    data = pattern(2 * MIB + 5)
    store = LocalStore(tmp_path)
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


# No room left


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, MIB, MIB + 5000])
@pytest.mark.parametrize("direct_io", [True, False])
def test_a_file_size_limit_leaves_nothing_behind(tmp_path: Path, limit: int, direct_io: bool) -> None:
    store = LocalStore(tmp_path / "run", direct_io=direct_io)
    store.put_if_absent("log/1", b"entry")
    data = pattern(2 * MIB)
    calls: list[Callable[[], object]] = [
        lambda: store.put_unique("ckpt/large", len(data), sections_of(aligned(data), MIB)),
        lambda: store.put_if_absent("log/2", data),
        lambda: store.replace("log/1", data),
    ]
    for call in calls:
        with largest_file(limit), pytest.raises(StorageFullError, match="run/"):
            call()
    assert files_below(tmp_path) == {"run/log/1"}
    assert store.read("log/1", 10) == b"entry"
    for call in calls:
        call()
    assert files_below(tmp_path) == {"run/log/1", "run/log/2", "run/ckpt/large"}


@contextlib.contextmanager
def mounted(target: Path, *options: str) -> Iterator[Path]:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


def test_a_full_disk_leaves_nothing_behind_and_works_again_with_room(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=4m", "none"):
        store = LocalStore(tmp_path)
        store.put_if_absent("log/1", b"entry")
        data = pattern(3 * MIB)
        (tmp_path / "ballast").write_bytes(bytes(2 * MIB))
        for call in (
            lambda: store.put_unique("ckpt/large", len(data), sections_of(aligned(data), MIB)),
            lambda: store.put_if_absent("log/2", data),
            lambda: store.replace("log/1", data),
        ):
            with pytest.raises(StorageFullError):
                call()
        assert files_below(tmp_path) == {"ballast", "log/1"}
        (tmp_path / "ballast").unlink()
        store.put_unique("ckpt/large", len(data), sections_of(aligned(data), MIB))
        assert (tmp_path / "ckpt/large").read_bytes() == data
        assert store.read("log/1", 10) == b"entry"


# No folder, or none to write to


def test_the_first_write_creates_the_root_and_its_parents(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a/b/run")
    assert store.stat("x") is None
    assert list(store.list("")) == list(store.folders("")) == []
    assert not (tmp_path / "a").exists(), "reading created a folder"
    store.put_if_absent("x", b"1")
    assert (tmp_path / "a/b/run/x").read_bytes() == b"1"


@pytest.mark.parametrize("seen_by", ["construction", "a write"])
def test_a_vanished_root_is_not_created_again(tmp_path: Path, seen_by: str) -> None:
    root = tmp_path / "run"
    if seen_by == "construction":
        root.mkdir()
    store = LocalStore(root)
    if seen_by == "a write":
        store.put_if_absent("log/1", b"1")
    shutil.rmtree(root)
    for call in (
        lambda: store.put_if_absent("log/2", b"2"),
        lambda: store.put_unique("large", 1, [memoryview(b"2")]),
        lambda: store.replace("checkpoint", b"2"),
    ):
        with pytest.raises(StorageError, match="vanished") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError)
    with pytest.raises(ObjectNotFoundError):
        store.read("log/1", 10)
    with pytest.raises(ObjectNotFoundError):
        store.open("log/1")
    assert store.stat("log/1") is None
    assert list(store.list("")) == list(store.list("log")) == list(store.folders("")) == []
    store.delete("log/1")
    assert not root.exists()


def test_an_open_object_outlives_its_deletion(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.put_if_absent("a", b"12345")
    source = store.open("a")
    shutil.rmtree(tmp_path / "run")
    target = bytearray(3)
    source.read_into(1, memoryview(target))
    source.close()
    assert target == b"234"
    with pytest.raises(ValueError, match="closed"):
        source.read_into(0, memoryview(target))


def test_a_read_only_folder_can_be_read_and_refuses_writes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("log/1", b"1")
    with mounted(tmp_path, "--bind", str(tmp_path)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
        store = LocalStore(tmp_path)
        assert store.read("log/1", 10) == b"1"
        for call in (
            lambda: store.put_if_absent("log/2", b"2"),
            lambda: store.put_unique("new/large", 1, [memoryview(b"2")]),
            lambda: store.replace("log/1", b"2"),
            lambda: store.delete("log/1"),
        ):
            with pytest.raises(StorageError, match=r"[Rr]ead-only"):
                call()
        with pytest.raises(StoreUnsuitableError, match=r"put-if-absent creates.*[Rr]ead-only"):
            probe(store)
        assert files_below(tmp_path) == {"log/1"}


@pytest.mark.parametrize("root", ["file", "file/run"])
def test_a_file_in_place_of_the_root_or_above_it(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    store = LocalStore(tmp_path / root)
    with pytest.raises(StorageError, match=r"a file is where a folder should be"):
        store.put_if_absent("x", b"1")
    assert store.stat("x") is None
    assert list(store.list("")) == []
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("a", b"1")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        store.put_if_absent("a/b", b"2")
    with pytest.raises(ObjectNotFoundError):
        store.read("a/b", 10)
    assert store.stat("a/b") is None
    assert list(store.list("a")) == []
    store.delete("a/b")
    assert store.read("a", 10) == b"1"


def test_a_folder_in_place_of_an_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("a/b", b"1")
    for call in (lambda: store.replace("a", b"2"), lambda: store.delete("a")):
        with pytest.raises(StorageError):
            call()
    with pytest.raises(AlreadyExistsError):
        store.put_unique("a", 1, [memoryview(b"2")])
    assert files_below(tmp_path) == {"a/b"}


# Planted links and other things that are not files


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "run").mkdir()
    return LocalStore(tmp_path / "run")


@pytest.mark.parametrize("prefix", ["", "deep/er/"])
def test_a_link_in_place_of_a_folder_is_not_followed(
    tmp_path: Path, outside: Path, store: LocalStore, prefix: str
) -> None:
    (tmp_path / "run" / prefix).mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / prefix / "link").symlink_to(outside)
    for call in (
        lambda: store.put_if_absent(f"{prefix}link/new", b"1"),
        lambda: store.put_unique(f"{prefix}link/new", 1, [memoryview(b"1")]),
        lambda: store.replace(f"{prefix}link/secret", b"1"),
        lambda: store.read(f"{prefix}link/secret", 10),
        lambda: store.open(f"{prefix}link/secret"),
        lambda: store.stat(f"{prefix}link/secret"),
        lambda: store.delete(f"{prefix}link/secret"),
        lambda: list(store.list(f"{prefix}link")),
    ):
        with pytest.raises(StorageError, match="symbolic link"):
            call()
    assert list(store.list("")) == []
    assert "link" not in list(store.folders(prefix.rstrip("/")))
    assert files_below(outside) == {"secret"}
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_link_in_place_of_an_object_is_not_followed(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    link = tmp_path / "run/link"
    link.symlink_to(outside / "secret")
    for call in (lambda: store.read("link", 10), lambda: store.open("link"), lambda: store.stat("link")):
        with pytest.raises(StorageError, match=r"symbolic link|not a plain file"):
            call()
    for call in (
        lambda: store.put_if_absent("link", b"1"),
        lambda: store.put_unique("link", 1, [memoryview(b"1")]),
    ):
        with pytest.raises(AlreadyExistsError):
            call()
    assert list(store.list("")) == []
    store.replace("link", b"mine")
    assert not link.is_symlink()
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_dangling_link_is_not_written_through(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    (tmp_path / "run/link").symlink_to(outside / "new")
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("link", b"1")
    with pytest.raises(AlreadyExistsError):
        store.put_unique("link", 1, [memoryview(b"1")])
    store.delete("link")
    assert files_below(tmp_path) == {"outside/secret"}


def test_the_root_itself_may_be_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "scratch").symlink_to(outside)
    store = LocalStore(tmp_path / "scratch")
    store.put_if_absent("log/1", b"1")
    assert (outside / "log/1").read_bytes() == b"1"
    assert store.url == str(tmp_path / "scratch")


def test_a_pipe_does_not_hang_the_reader(tmp_path: Path, store: LocalStore) -> None:
    os.mkfifo(tmp_path / "run/pipe")
    for call in (lambda: store.read("pipe", 10), lambda: store.open("pipe"), lambda: store.stat("pipe")):
        with pytest.raises(StorageError, match="not a plain file"):
            call()
    assert list(store.list("")) == []


def test_what_no_store_could_have_written_is_not_listed(tmp_path: Path, store: LocalStore) -> None:
    for name in (".hidden", "back\\slash", "new\nline"):
        (tmp_path / "run" / name).write_bytes(b"x")
    (tmp_path / "run/.folder").mkdir()
    (tmp_path / "run/.folder/inside").write_bytes(b"x")
    store.put_if_absent("plain", b"x")
    assert [info.path for info in store.list("")] == ["plain"]
    assert list(store.folders("")) == []


def test_temporary_files_are_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    seen: list[tuple[set[str], list[str]]] = []
    fsync = os.fsync

    def looking(fd: int) -> None:
        seen.append((files_below(tmp_path), [info.path for info in store.list("")]))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", looking)
    store.put_if_absent("log/1", b"1")
    there, listed = seen[0]
    assert len(there) == 1
    assert listed == []
    assert files_below(tmp_path) == {"log/1"}


# System calls that fail

SYSTEM_CALLS = ("open", "mkdir", "link", "replace", "unlink", "fsync", "pwrite", "preadv", "stat", "fstat", "scandir")


class FailingCalls:
    """Counts file system calls, and lets the one at ``fail_at`` fail with ``number``."""

    def __init__(self, fail_at: int, number: int) -> None:
        self.count = 0
        self.failed: str | None = None
        self._fail_at = fail_at
        self._errno = number

    def wrap(self, name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            index = self.count
            self.count += 1
            if index == self._fail_at:
                self.failed = name
                raise OSError(self._errno, os.strerror(self._errno))
            return original(*arguments, **options)

        return call


@contextlib.contextmanager
def failing_call(fail_at: int, number: int) -> Iterator[FailingCalls]:
    calls = FailingCalls(fail_at, number)
    with pytest.MonkeyPatch.context() as patch:
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, calls.wrap(name))
        yield calls


OPERATIONS: dict[str, Callable[[LocalStore], object]] = {
    "put_if_absent": lambda store: store.put_if_absent("new/folder/x", b"new"),
    "put_unique": lambda store: store.put_unique("new/folder/x", 2 * MIB, [aligned(bytes(MIB)), aligned(bytes(MIB))]),
    "replace": lambda store: store.replace("old/x", b"new"),
    "read": lambda store: store.read("old/x", 10),
    "stat": lambda store: store.stat("old/x"),
    "list": lambda store: list(store.list("")),
    "folders": lambda store: list(store.folders("")),
    "delete": lambda store: store.delete("old/x"),
    "probe": probe,
}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_system_call_may_fail(quick_path: Path, operation: str, number: int) -> None:
    run = OPERATIONS[operation]
    index = 0
    while True:
        store = LocalStore(quick_path / str(index))
        store.put_if_absent("old/x", b"old")
        before = open_descriptors()
        with failing_call(index, number) as calls:
            try:
                run(store)
            except DistckptError as error:
                failure: DistckptError | None = error
            else:
                failure = None
        assert open_descriptors() == before, f"call {index}, {calls.failed}, leaked a descriptor"
        if calls.failed is None:
            break
        check_outcome(quick_path / str(index), operation, failure, f"call {index}, {calls.failed}")
        index += 1
    assert index > 1


def check_outcome(root: Path, operation: str, failure: DistckptError | None, where: str) -> None:
    if operation == "put_if_absent" and not isinstance(failure, StoreOutcomeUnknownError):
        assert (root / "new/folder/x").exists() == (failure is None), where
    if operation == "put_unique" and failure is None:
        assert (root / "new/folder/x").stat().st_size == 2 * MIB, where
    if operation == "replace":
        possible = {b"old", b"new"} if failure else {b"new"}
        assert (root / "old/x").read_bytes() in possible, where
    if operation == "read":
        assert failure is not None, where
    if operation == "probe" and failure is not None:
        assert isinstance(failure, StoreUnsuitableError), where


def test_a_failed_sync_of_the_folder_leaves_the_outcome_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "lost")
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        for call in (lambda: store.put_if_absent("log/1", b"1"), lambda: store.replace("lease", b"1")):
            with pytest.raises(StoreOutcomeUnknownError):
                call()
        with pytest.raises(StorageError):
            store.put_unique("large", 1, [memoryview(b"1")])
    assert files_below(tmp_path) == {"log/1", "lease"}
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"2")


def test_a_folder_that_cannot_be_synced_at_all_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "no such thing")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    LocalStore(tmp_path / "run").put_if_absent("log/1", b"1")
    assert (tmp_path / "run/log/1").read_bytes() == b"1"


@pytest.mark.parametrize("reached", [True, False])
def test_a_link_whose_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: bool) -> None:
    """NFS sends a request again if no answer came, and may then be told that the name exists."""
    link = os.link

    def retried(source: str, target: str, **options: Any) -> None:
        if reached:
            link(source, target, **options)
        raise FileExistsError(errno.EEXIST, "exists")

    store = LocalStore(tmp_path)
    if not reached:
        (tmp_path / "1").write_bytes(b"theirs")
    monkeypatch.setattr(os, "link", retried)
    outcome = contextlib.nullcontext() if reached else pytest.raises(AlreadyExistsError)
    with outcome:
        store.put_if_absent("1", b"ours")
    assert (tmp_path / "1").read_bytes() == (b"ours" if reached else b"theirs")


def test_a_file_system_without_links_is_refused_by_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(source: str, target: str, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refusing)
    with pytest.raises(StoreUnsuitableError, match="put-if-absent creates an object"):
        probe(LocalStore(tmp_path))
    assert files_below(tmp_path) == set()


# Several processes


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], stdout=subprocess.PIPE, text=True
    )


def test_of_several_processes_one_wins_each_name(tmp_path: Path) -> None:
    script = """
        import os, sys
        from distckpt.errors import AlreadyExistsError
        from distckpt.storage import LocalStore

        def run(worker):
            store = LocalStore(sys.argv[1])
            won = 0
            for number in range(60):
                try:
                    store.put_if_absent(f"log/{number}", b"%d" % worker)
                    won += 1
                except AlreadyExistsError:
                    pass
            store.put_if_absent(f"won/{worker}", b"%d" % won)

        children = []
        for worker in range(4):
            child = os.fork()
            if not child:
                try:
                    run(worker)
                except BaseException as error:
                    print(error, flush=True)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    """
    with run_script(script, str(tmp_path / "run")) as process:
        printed, _ = process.communicate(timeout=50)
    assert printed == ""
    store = LocalStore(tmp_path / "run")
    claimed = [int(store.read(f"won/{worker}", 10)) for worker in range(4)]
    owners = [int(store.read(f"log/{number}", 10)) for number in range(60)]
    assert claimed == [owners.count(worker) for worker in range(4)]


def test_a_killed_process_leaves_only_whole_objects(tmp_path: Path) -> None:
    script = """
        import sys
        from distckpt.storage import LocalStore

        store = LocalStore(sys.argv[1])
        for number in range(100_000):
            store.put_if_absent(f"log/{number}", bytes([number % 256]) * 300_000)
            store.replace("checkpoint", bytes([number % 256]) * 300_000)
            print(number, flush=True)
    """
    with run_script(script, str(tmp_path / "run")) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        acknowledged += map(int, process.stdout.read().split())
    store = LocalStore(tmp_path / "run")
    numbers = sorted(int(info.path.rpartition("/")[2]) for info in store.list("log"))
    assert set(acknowledged) <= set(numbers)
    assert numbers == list(range(len(numbers)))
    for number in numbers:
        assert store.read(f"log/{number}", MIB) == bytes([number % 256]) * 300_000
    checkpoint = store.read("checkpoint", MIB)
    assert checkpoint == checkpoint[:1] * 300_000
