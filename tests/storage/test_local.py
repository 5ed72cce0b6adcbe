"""The local store when the disk is full, the folder gone, a link planted, or the process killed."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distckpt.errors import (
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    StoreUnsuitableError,
)
from distckpt.storage import LocalStore, probe
from distckpt.testing.observing import MIB, aligned, files_below, pattern, sections_of

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
    with pytest.raises(BlockedError, match="a file is where a folder should be"):
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
    for call in (
        lambda: store.replace("a", b"2"),
        lambda: store.delete("a"),
        lambda: store.put_if_absent("a", b"2"),
    ):
        with pytest.raises(BlockedError, match=r"a folder is.*Move it away"):
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
        lambda: store.delete(f"{prefix}link/secret"),
    ):
        with pytest.raises(BlockedError, match=r"symbolic link.*Move it away"):
            call()
    for read in (
        lambda: store.read(f"{prefix}link/secret", 10),
        lambda: store.open(f"{prefix}link/secret"),
        lambda: store.stat(f"{prefix}link/secret"),
        lambda: list(store.list(f"{prefix}link")),
        lambda: list(store.folders(f"{prefix}link")),
    ):
        with pytest.raises(DamagedError, match="symbolic link"):
            read()
    assert list(store.list("")) == []
    assert "link" not in list(store.folders(prefix.rstrip("/")))
    assert files_below(outside) == {"secret"}
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_link_in_place_of_an_object_is_not_followed(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    link = tmp_path / "run/link"
    link.symlink_to(outside / "secret")
    for call in (lambda: store.read("link", 10), lambda: store.open("link"), lambda: store.stat("link")):
        with pytest.raises(DamagedError, match="symbolic link"):
            call()
    with pytest.raises(BlockedError, match=r"/run/link: a symbolic link is there"):
        store.put_if_absent("link", b"1")
    with pytest.raises(AlreadyExistsError):
        store.put_unique("link", 1, [memoryview(b"1")])
    assert list(store.list("")) == []
    store.replace("link", b"mine")
    assert not link.is_symlink()
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_dangling_link_is_not_written_through(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    (tmp_path / "run/link").symlink_to(outside / "new")
    with pytest.raises(BlockedError):
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
        with pytest.raises(DamagedError, match="a pipe is there"):
            call()
    with pytest.raises(BlockedError, match="a pipe is there"):
        store.put_if_absent("pipe", b"1")
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
    there, listed = next(one for one in seen if one[0])
    assert len(there) == 1
    assert listed == []
    assert files_below(tmp_path) == {"log/1"}


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
