"""What a power loss could take away: seen from the calls that reach the operating system, in their order."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distckpt.errors import AlreadyExistsError
from distckpt.storage import LocalStore
from distckpt.testing.observing import MIB


class Event(NamedTuple):
    """kind: create, write, sync, name (a link to, or a rename of, ``source``), remove or mkdir."""

    kind: str
    path: str
    source: str = ""


def lost_by_power_loss(events: Sequence[Event]) -> set[str]:
    """Files whose bytes, and folders whose entries, may not be on the disk after these events.

    AssertionError if a file got its name before its bytes were synced.
    """
    unsynced: set[str] = set()
    for event in events:
        if event.kind == "sync":
            unsynced.discard(event.path)
        elif event.kind == "write":
            unsynced.add(event.path)
        elif event.kind == "create":
            unsynced |= {event.path, os.path.dirname(event.path)}
        elif event.kind == "remove":
            unsynced.discard(event.path)
            unsynced.add(os.path.dirname(event.path))
        else:
            assert event.source not in unsynced, f"{event.path} was named before {event.source} was synced"
            unsynced.add(os.path.dirname(event.path))
    return unsynced


# Two ways to see the calls


def descriptor_path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@contextlib.contextmanager
def python_calls() -> Iterator[list[Event]]:
    """What Python's os module is asked for."""
    events: list[Event] = []

    def absolute(path: str, folder: int | None) -> str:
        return path if folder is None else os.path.join(descriptor_path(folder), path)

    def after(name: str, note: Callable[..., None]) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            note(*arguments, **options)
            return result

        return call

    def note_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if flags & os.O_CREAT:
            events.append(Event("create", absolute(path, dir_fd)))

    def note_name(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool = True) -> None:
        events.append(Event("name", absolute(target, dst_dir_fd), absolute(source, src_dir_fd)))

    notes: dict[str, Callable[..., None]] = {
        "open": note_open,
        "pwrite": lambda fd, *_: events.append(Event("write", descriptor_path(fd))),
        "fsync": lambda fd: events.append(Event("sync", descriptor_path(fd))),
        "link": note_name,
        "replace": note_name,
        "unlink": lambda path, *, dir_fd: events.append(Event("remove", absolute(path, dir_fd))),
        "mkdir": lambda path, mode=0o777, *, dir_fd=None: events.append(Event("mkdir", absolute(path, dir_fd))),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, note in notes.items():
            patch.setattr(os, name, after(name, note))
        yield events


FOLDER = r"(?:AT_FDCWD|\d+)<(?P<{0}folder>[^>]*)>"
NAME = rf'{FOLDER.format("s")}, "(?P<source>[^"]*)", {FOLDER.format("")}, "(?P<path>[^"]*)".*'
LINES: list[tuple[str, str]] = [
    ("create", r'openat\(AT_FDCWD, "[^"]*", [^)]*O_CREAT.*\) = \d+<(?P<path>[^>]*)>'),
    ("create", r"openat\(.*O_CREAT.*\) = \d+<(?P<path>[^>]*)>"),
    ("write", r"(?:pwrite64|write|pwritev|pwritev2)\(\d+<(?P<path>[^>]*)>.* = \d+$"),
    ("sync", r"(?:fsync|fdatasync)\(\d+<(?P<path>[^>]*)>\) += 0$"),
    ("name", rf"(?:linkat|renameat|renameat2)\({NAME}\) = 0$"),
    ("remove", rf'unlinkat\({FOLDER.format("")}, "(?P<path>[^"]*)", 0\) += 0$'),
    ("mkdir", rf'mkdirat\({FOLDER.format("")}, "(?P<path>[^"]*)", \w+\) += 0$'),
    ("mkdir", r'mkdir\("(?P<path>[^"]*)", \w+\) += 0$'),
]
TRACED = (
    "openat,open,creat,write,pwrite64,pwritev,pwritev2,fsync,fdatasync,link,linkat,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat"
)


def whole_lines(lines: list[str]) -> Iterator[str]:
    """Calls that another thread's interrupted in the record, put together where they end."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith(" <unfinished ...>"):
            begun[thread] = call.removesuffix(" <unfinished ...>")
        elif call.startswith("<... "):
            yield begun.pop(thread) + call.partition(" resumed>")[2]
        else:
            yield call


def parsed(line: str) -> Event | None:
    for kind, pattern in LINES:
        match = re.search(pattern, line)
        if match:
            found = match.groupdict()
            path = os.path.join(found.get("folder") or "", found["path"])
            source = os.path.join(found["sfolder"], found["source"]) if "source" in found else ""
            return Event(kind, path, source)
    return None


@contextlib.contextmanager
def system_calls(output: Path) -> Iterator[list[Event]]:
    """What the kernel was asked for, told by strace attached to this very process."""
    if not shutil.which("strace"):
        pytest.skip("there is no strace")
    events: list[Event] = []
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={TRACED}", "-o", str(output), "-p", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        if "attached" not in strace.stderr.readline():
            pytest.skip("strace may not attach to this process")
        try:
            yield events
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(10)
    events.extend(event for event in map(parsed, whole_lines(output.read_text().splitlines())) if event)


@pytest.fixture(params=["python", "kernel"])
def observed(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[], object]], list[Event]]:
    def run(action: Callable[[], object]) -> list[Event]:
        with python_calls() if request.param == "python" else system_calls(tmp_path / "trace") as events:
            action()
        return [event for event in events if event.path.startswith(str(tmp_path)) and "trace" not in event.path]

    return run


Observed = Callable[[Callable[[], object]], list[Event]]
LARGE = [memoryview(bytes(MIB)), memoryview(bytes(MIB)), memoryview(b"tail")]


def put_unique(store: LocalStore, path: str) -> None:
    store.put_unique(path, 2 * MIB + 4, LARGE)


WRITES: dict[str, Callable[[LocalStore, str], None]] = {
    "put_if_absent": lambda store, path: store.put_if_absent(path, b"content"),
    "put_unique": put_unique,
    "replace": lambda store, path: store.replace(path, b"content"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_new_folders_is_durable_on_return(observed: Observed, tmp_path: Path, write: str) -> None:
    store = LocalStore(tmp_path / "above/run")
    events = observed(lambda: WRITES[write](store, "ckpt-1/e1/object"))
    assert {event.kind for event in events} >= {"create", "write", "sync", "mkdir"}
    assert lost_by_power_loss(events) == set()
    check_that_each_sync_is_needed(events)


def check_that_each_sync_is_needed(events: list[Event]) -> None:
    """Leaving out any one of the syncs would lose something: so a store that forgets one cannot pass unseen."""
    syncs = [index for index, event in enumerate(events) if event.kind == "sync"]
    for index in syncs:
        try:
            lost = lost_by_power_loss(events[:index] + events[index + 1 :])
        except AssertionError:
            continue
        assert lost, f"the sync of {events[index].path} changed nothing"


@pytest.mark.parametrize("write", WRITES)
def test_folders_that_somebody_else_made_just_before_the_first_write_are_durable_too(
    observed: Observed, tmp_path: Path, write: str
) -> None:
    root = tmp_path / "above/run"

    def make_and_write() -> None:
        os.makedirs(str(root))
        WRITES[write](LocalStore(root), "object")

    events = observed(make_and_write)
    assert [event.path for event in events if event.kind == "mkdir"] == [str(tmp_path / "above"), str(root)]
    assert lost_by_power_loss(events) == set()
    check_that_each_sync_is_needed(events)


def test_the_way_to_the_root_is_synced_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    with python_calls() as events:
        for number in range(3):
            store.put_if_absent(f"log/{number}", b"entry")
    assert [event.path for event in events if event.kind == "sync"].count(str(tmp_path)) == 1


@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_known_folder_is_durable_on_return(observed: Observed, tmp_path: Path, write: str) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("ckpt-1/e1/other", b"")
    events = observed(lambda: WRITES[write](store, "ckpt-1/e1/object"))
    assert lost_by_power_loss(events) == set()
    synced = {event.path for event in events if event.kind == "sync"}
    assert {str(tmp_path), str(tmp_path / "ckpt-1"), str(tmp_path / "ckpt-1/e1")} <= synced, (
        "another process may have created these folders without having synced them yet"
    )


def test_a_replacement_is_synced_before_it_takes_the_place_of_the_old(observed: Observed, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.replace("checkpoint", b"old")
    events = observed(lambda: store.replace("checkpoint", b"new"))
    named = [event for event in events if event.kind == "name"]
    assert [event.path for event in named] == [str(tmp_path / "checkpoint")]
    assert lost_by_power_loss(events) == set()


def test_a_refusal_is_durable_too(observed: Observed, tmp_path: Path) -> None:
    """Whoever is told "exists", and finds its own bytes there after a restart, has committed."""
    store = LocalStore(tmp_path)
    store.put_if_absent("log/1", b"first")

    def refused() -> None:
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent("log/1", b"second")

    events = observed(refused)
    assert not [event for event in events if event.kind == "name"]
    assert Event("sync", str(tmp_path / "log")) in events
    assert lost_by_power_loss(events) == set()


def test_the_model_sees_a_name_given_too_early() -> None:
    events = [Event("create", "/r/.tmp"), Event("write", "/r/.tmp"), Event("name", "/r/1", "/r/.tmp")]
    with pytest.raises(AssertionError, match="before"):
        lost_by_power_loss(events)
    assert lost_by_power_loss(events[:2]) == {"/r/.tmp", "/r"}
