"""The local store when a system call fails, or does its work and then says that it failed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import (
    AlreadyExistsError,
    DistckptError,
    StorageError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
)
from distckpt.storage import LocalStore, probe
from distckpt.testing.observing import MIB, aligned, files_below


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def open_descriptors(folder: Path) -> list[str]:
    """What is open below ``folder``: threads of other tests' libraries open and close what they like."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.startswith(str(folder))]


SYSTEM_CALLS = (
    "open",
    "mkdir",
    "link",
    "replace",
    "unlink",
    "fsync",
    "pwrite",
    "pread",
    "preadv",
    "lseek",
    "stat",
    "fstat",
    "scandir",
)


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
        before = open_descriptors(quick_path)
        with failing_call(index, number) as calls:
            try:
                run(store)
            except DistckptError as error:
                failure: DistckptError | None = error
            else:
                failure = None
        assert open_descriptors(quick_path) == before, f"call {index}, {calls.failed}, leaked a descriptor"
        if calls.failed is None:
            break
        check_outcome(quick_path / str(index), operation, failure, f"call {index}, {calls.failed}")
        index += 1
    assert index > 1


FIRST_WRITES: dict[str, Callable[[LocalStore], object]] = {
    "put_if_absent": OPERATIONS["put_if_absent"],
    "put_unique": OPERATIONS["put_unique"],
    "replace": lambda store: store.replace("new/folder/x", b"new"),
    "probe": probe,
}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", FIRST_WRITES)
def test_a_first_write_that_fails_leaves_no_folder_behind(quick_path: Path, operation: str, number: int) -> None:
    for index in itertools.count():
        above = quick_path / str(index)
        store = LocalStore(above / "run")
        with failing_call(index, number) as calls:
            try:
                FIRST_WRITES[operation](store)
            except DistckptError as error:
                failure: DistckptError | None = error
            else:
                failure = None
        if calls.failed is None:
            break
        if not above.exists():
            assert failure is not None
            FIRST_WRITES[operation](store)
        if failure is not None and operation != "probe" and not isinstance(failure, StoreOutcomeUnknownError):
            assert files_below(above) or not above.exists(), f"call {index}, {calls.failed}"
    assert index > 10


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


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_root_that_cannot_be_asked_for_is_not_said_to_have_vanished(tmp_path: Path, number: int) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("old/x", b"old")
    with failing_call(0, number) as calls, pytest.raises(StorageError, match=os.strerror(number)):
        store.put_if_absent("old/y", b"new")
    assert calls.failed == "stat"
    store.put_if_absent("old/y", b"new")


def test_what_cannot_be_closed_has_been_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("old/x", b"old")
    close = os.close

    def failing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "lost")

    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", failing)
        assert store.read("old/x", 10) == b"old"
        assert store.stat("old/x") is not None
        assert [info.path for info in store.list("old")] == ["old/x"]
        source = store.open("old/x")
    [opened] = (int(fd) for fd in set(os.listdir("/proc/self/fd")) - before if os.path.exists(f"/proc/self/fd/{fd}"))
    os.close(opened)  # behind its back, so that closing it fails
    source.close()
    source.close()


def test_a_failed_sync_of_the_folder_leaves_the_outcome_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.replace("lease", b"0")
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


def test_a_link_that_may_have_happened_is_of_unknown_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def cut_off(source: str, target: str, **options: Any) -> None:
        link(source, target, **options)
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(os, "link", cut_off)
    with pytest.raises(StoreOutcomeUnknownError, match="may or may not"):
        LocalStore(tmp_path).put_if_absent("1", b"ours")
    assert files_below(tmp_path) == {"1"}


OPERATIONS_ON_A_LEASE: dict[str, Callable[[LocalStore], object]] = {
    "put_if_absent": lambda store: store.put_if_absent("leases/a", b"1"),
    "put_unique": lambda store: store.put_unique("leases/a", 1, [memoryview(b"1")]),
    "replace": lambda store: store.replace("leases/a", b"1"),
}


@pytest.mark.parametrize("write", OPERATIONS_ON_A_LEASE)
def test_a_folder_removed_under_a_writer_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    system = os.open
    removed: list[Path] = []

    def removing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and len(removed) < 3:
            removed.append(tmp_path / "leases")
            removed[-1].rmdir()
        return system(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", removing)
    OPERATIONS_ON_A_LEASE[write](LocalStore(tmp_path))
    assert len(removed) == 3
    assert (tmp_path / "leases/a").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_links_is_refused_with_the_cause_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(source: str, target: str, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refusing)
    with pytest.raises(StoreUnsuitableError, match=r"file system at /\S* refuses hard links .* Use a directory on"):
        LocalStore(tmp_path / "above/run").put_if_absent("a", b"x")
    with pytest.raises(StoreUnsuitableError, match="refuses hard links"):
        probe(LocalStore(tmp_path / "above/run"))
    assert list(tmp_path.iterdir()) == []
