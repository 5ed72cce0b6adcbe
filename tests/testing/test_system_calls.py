"""The library that stands between a process and libc: what it counts, what it lets fail, and what it records."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt.testing.power_loss import AllKept, AllLost, Disk, read_record, read_tree
from distckpt.testing.system_calls import KINDS, Failure, Kind, NoCompilerError, SystemCalls, build
from tests.support.crashing import Crashing, Say
from tests.support.preload import library


@pytest.fixture(scope="module")
def preload() -> str:
    """The library, compiled."""
    try:
        return library()
    except NoCompilerError as error:
        pytest.skip(str(error))


def in_process(preload: str, function: Callable[..., None], **arguments: Any) -> list[Any]:
    """What a function says in a process that has preloaded the library."""
    return Crashing(function, preload=preload, **arguments).end(60).said


# ---- counting ---------------------------------------------------------------------------------------------------------


def use_all(folder: str) -> None:
    """Each kind of call at least once, by as many of its names as Python knows."""
    os.mkdir(f"{folder}/a")
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.mkdir("b", dir_fd=above)
    fd = os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=above)
    os.write(fd, b"0123456789")
    os.pwrite(fd, b"ab", 3)
    os.writev(fd, [b"x", b"yz"])
    os.pwritev(fd, [b"c", b"d"], 6)
    os.lseek(fd, 0, os.SEEK_SET)
    os.read(fd, 2)
    os.pread(fd, 2, 1)
    os.readv(fd, [bytearray(2)])
    os.preadv(fd, [bytearray(2)], 1)
    os.ftruncate(fd, 12)
    os.fsync(fd)
    os.fdatasync(fd)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    os.write(fd, b"end")
    os.close(fd)
    with Path(folder, "another").open("wb") as file:
        file.write(b"another")
    os.link("file", "second", src_dir_fd=above, dst_dir_fd=above)
    os.rename(f"{folder}/second", f"{folder}/a/second")
    os.replace("file", "b/file", src_dir_fd=above, dst_dir_fd=above)
    os.unlink(f"{folder}/a/second")
    os.rmdir("a", dir_fd=above)
    os.fsync(above)
    os.close(above)
    os.listdir(folder)
    os.stat(folder)
    os.lstat(folder)


def count(say: Say, folder: str, elsewhere: str) -> None:
    """Say how many calls there are of each kind: in another folder, then in the watched one."""
    calls = SystemCalls(folder)
    use_all(elsewhere)
    say(calls.counted)
    use_all(folder)
    say(calls.counted)


def test_calls_below_the_folder_are_counted_and_no_others(preload: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "hereafter").mkdir()
    before, after = in_process(preload, count, folder=str(tmp_path / "here"), elsewhere=str(tmp_path / "hereafter"))
    assert set(before.values()) == {0}
    assert list(after) == list(KINDS)
    assert all(after.values()), after
    expected = {"write": 6, "read": 4, "sync": 3, "link": 1, "unlink": 1, "rename": 2, "mkdir": 2, "rmdir": 1}
    assert {kind: after[kind] for kind in expected} == expected


# ---- failing ----------------------------------------------------------------------------------------------------------


def fail(say: Say, folder: str, failure: str, act: str) -> None:
    """Do one of ``ACTS`` with a failure; say what came of it."""
    os.makedirs(f"{folder}/empty")
    Path(folder, "old").write_bytes(b"0123456789")
    fd = os.open(f"{folder}/old", os.O_RDWR)
    calls = SystemCalls(folder)
    calls.fail(Failure.parse(failure))
    try:
        result = ACTS[act](folder, fd)
    except OSError as error:
        result = errno.errorcode[error.errno or 0]
    say([result, calls.struck.replace(folder, ".")])


ACTS: dict[str, Callable[[str, int], Any]] = {
    "open": lambda folder, _: os.open(f"{folder}/old", os.O_RDONLY),
    "create": lambda folder, _: os.open(f"{folder}/new", os.O_CREAT | os.O_WRONLY),
    "read": lambda _, fd: os.pread(fd, 4, 0).decode(),
    "write": lambda _, fd: os.pwrite(fd, b"abcd", 0),
    "sync": lambda _, fd: os.fsync(fd),
    "link": lambda folder, _: os.link(f"{folder}/old", f"{folder}/new"),
    "unlink": lambda folder, _: os.unlink(f"{folder}/old"),
    "rename": lambda folder, _: os.rename(f"{folder}/old", f"{folder}/new"),
    "mkdir": lambda folder, _: os.mkdir(f"{folder}/new"),
    "rmdir": lambda folder, _: os.rmdir(f"{folder}/empty"),
    "list": lambda folder, _: sorted(os.listdir(folder)),
    "entry": lambda folder, _: sorted(os.listdir(folder)),
    "stat": lambda folder, _: os.stat(f"{folder}/old").st_size,
    "close": lambda _, fd: os.close(fd),
    "flags": lambda _, fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND),
    "truncate": lambda _, fd: os.ftruncate(fd, 3),
}
AFTERWARDS: dict[str, dict[str, Any]] = {
    "create": {"empty": {}, "new": b"", "old": b"0123456789"},
    "write": {"empty": {}, "old": b"abcd456789"},
    "link": {"empty": {}, "new": b"0123456789", "old": b"0123456789"},
    "unlink": {"empty": {}},
    "rename": {"empty": {}, "new": b"0123456789"},
    "mkdir": {"empty": {}, "new": {}, "old": b"0123456789"},
    "rmdir": {"old": b"0123456789"},
    "truncate": {"empty": {}, "old": b"012"},
}
"""What is in the folder when a call that changes something has been made."""
UNTOUCHED = {"empty": {}, "old": b"0123456789"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_of_each_kind_fails_with_nothing_done(preload: str, tmp_path: Path, kind: Kind) -> None:
    told = {"folder": str(tmp_path / "x"), "act": kind}
    [[result, struck]] = in_process(preload, fail, failure=f"{kind}:0:before:ESTALE:1", **told)
    assert result == "ESTALE"
    assert struck.startswith(f"{kind} .")
    assert read_tree(tmp_path / "x") == UNTOUCHED


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_an_answer_is_lost_with_all_done(preload: str, tmp_path: Path, kind: Kind) -> None:
    told = {"folder": str(tmp_path / "x"), "act": kind}
    [[result, _]] = in_process(preload, fail, failure=f"{kind}:0:after:EIO:1", **told)
    assert result == "EIO"
    assert read_tree(tmp_path / "x") == AFTERWARDS[kind]


@pytest.mark.parametrize("kind", sorted(AFTERWARDS.keys() - {"create"}))
def test_a_call_lies(preload: str, tmp_path: Path, kind: Kind) -> None:
    told = {"folder": str(tmp_path / "x"), "act": kind}
    [[result, _]] = in_process(preload, fail, failure=f"{kind}:0:pretend:EIO:1", **told)
    assert result in (None, 4)
    assert read_tree(tmp_path / "x") == UNTOUCHED


def test_half_of_the_bytes_are_moved(preload: str, tmp_path: Path) -> None:
    [[read, _]] = in_process(preload, fail, folder=str(tmp_path / "r"), act="read", failure="read:0:short:EIO:1")
    [[written, _]] = in_process(preload, fail, folder=str(tmp_path / "w"), act="write", failure="write:0:short:EIO:1")
    assert (read, written) == ("01", 2)
    assert read_tree(tmp_path / "w")["old"] == b"ab23456789"


def write_five(say: Say, folder: str, failure: str) -> None:
    """Write five times; say which of them failed."""
    calls = SystemCalls(folder)
    calls.fail(Failure.parse(failure))
    with Path(folder, "file").open("wb", buffering=0) as file:
        for at in range(5):
            try:
                file.write(b"x")
            except OSError:
                say(at)


def test_a_failure_has_a_place_and_lasts_as_long_as_it_is_told_to(preload: str, tmp_path: Path) -> None:
    def failed(failure: str) -> list[int]:
        return in_process(preload, write_five, folder=str(tmp_path), failure=failure)

    assert failed("write:1:before:EIO:1") == [1]
    assert failed("write:1:before:EIO:2") == [1, 2]
    assert failed("write:3:before:EIO:on") == [3, 4]
    assert failed("write+create:3:before:EIO:1") == [2]
    assert failed("read:0:before:EIO:on") == []


def test_a_failure_is_told_by_a_text() -> None:
    failure = Failure(("open", "write"), 17, "short", errno.ENOSPC, None)
    assert str(failure) == "open+write:17:short:ENOSPC:on"
    assert Failure.parse(str(failure)) == failure
    for nonsense in (
        "",
        "write",
        "write:1:before:EIO",
        "wrote:1:before:EIO:1",
        "write:1:never:EIO:1",
        "write:1:before:X:1",
    ):
        with pytest.raises(ValueError, match="is no failure"):
            Failure.parse(nonsense)


def test_who_has_not_preloaded_the_library_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="preloading"):
        SystemCalls(tmp_path)


def test_who_has_no_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoCompilerError, match="failed"):
        build(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompilerError, match="needs a C compiler"):
        build(tmp_path)


# ---- recording --------------------------------------------------------------------------------------------------------


def be_recorded(say: Say, folder: str, record: str) -> None:
    """Use all calls, and mark where that ends."""
    calls = SystemCalls(folder)
    calls.record(record)
    use_all(folder)
    calls.mark("used")
    Path(folder, "after").write_bytes(b"mark")


def test_a_record_accounts_for_all_that_there_is(preload: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    in_process(preload, be_recorded, folder=str(tmp_path / "x"), record=str(tmp_path / "record"))
    events = read_record(tmp_path / "record")
    used = [event.kind for event in events].index("mark")
    assert [event.kind for event in events[:4]] == ["root", "mkdir", "mkdir", "create"]
    disk = Disk()
    for event in events[: used + 1]:
        disk.apply(event)
    assert disk.marks == ("used",)
    assert disk.after_power_loss(AllLost()) == {"b": {"file": b"012ab5cd89xy"}, "another": b""}
    assert disk.after_power_loss(AllKept()) == {"b": {"file": b"012ab5cd89xyend"}, "another": b"another"}
    for event in events[used + 1 :]:
        disk.apply(event)
    assert disk.after_power_loss(AllKept()) == read_tree(tmp_path / "x")
