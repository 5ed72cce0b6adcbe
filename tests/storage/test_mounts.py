"""File systems that hold a directory: what is known of them, and what their limits look like."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.errors import AlreadyExistsError, ObjectNotFoundError, StorageError, StoreUnsuitableError
from distckpt.storage import LocalStore, Store, probe
from distckpt.storage.mounts import Mount, mount_of, mounts, warn_of_late_views
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import Outside
from tests.support.fuse import showing
from tests.support.mounts import disk, overlay, read_only, small_disk
from tests.support.stores import Files

TABLE = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:40 / /mnt/nfs rw,relatime shared:7 - nfs4 host:/a rw,vers=4.2,rsize=1048576,hard
41 40 0:41 / /mnt/nfs/at\\040once rw,relatime - nfs host:/b rw,vers=3,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0
42 27 0:42 / /mnt/short rw - nfs4 host:/c rw,acdirmax=5
43 27 0:43 / /mnt/never rw - nfs4 host:/d rw,noac
44 27 0:44 / /mnt/over rw - nfs4 host:/e rw
45 44 0:45 / /mnt/over rw - xfs /dev/sdb rw
no line of a mountinfo
""".splitlines()


@pytest.mark.parametrize(
    ("path", "kind", "point", "behind"),
    [
        ("/", "ext4", "/", 0),
        ("/mnt/nfs-not/run", "ext4", "/", 0),
        ("/mnt/nfs", "nfs4", "/mnt/nfs", 60),
        ("/mnt/nfs/a/run", "nfs4", "/mnt/nfs", 60),
        ("/mnt/nfs/at once/run", "nfs", "/mnt/nfs/at once", 0),
        ("/mnt/short/run", "nfs4", "/mnt/short", 5),
        ("/mnt/never/run", "nfs4", "/mnt/never", 0),
        ("/mnt/over/run", "xfs", "/mnt/over", 0),
    ],
)
def test_a_path_lies_on_the_innermost_mount_and_nfs_says_how_late_it_is(
    path: str, kind: str, point: str, behind: int
) -> None:
    mount = mount_of(path, TABLE)
    assert mount is not None
    assert (mount.kind, mount.point, mount.seconds_behind) == (kind, point, behind)


def test_options_of_the_mount_and_of_the_file_system_are_known() -> None:
    mount = next(mounts(TABLE))
    assert mount == Mount("/", "ext4", "/dev/vda", ("rw", "relatime", "rw", "discard"))
    assert (mount.option("discard"), mount.option("noac")) == ("", None)


def test_a_system_that_does_not_say_is_no_error() -> None:
    assert mount_of("/data", []) is None
    warn_of_late_views("/data", [])


def test_who_saves_on_nfs_is_told_once_what_is_promised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distckpt"):
        for directory in ("/mnt/nfs/one", "/mnt/nfs/one", "/mnt/short/two", "/mnt/never/three", "/home/four"):
            warn_of_late_views(directory, TABLE)
    assert [record.args[0] for record in caplog.records if record.args] == ["/mnt/nfs/one", "/mnt/short/two"]
    assert "may not see for 60 s" in caplog.text


def test_a_mount_of_this_machine_is_found(tmp_path: Path) -> None:
    with small_disk(tmp_path / "a disk", "1m") as disk:
        mount = mount_of(str(disk / "run/ckpt-1"))
        assert mount is not None
        assert (mount.kind, mount.point) == ("tmpfs", str(disk))


def test_a_read_only_file_system_can_be_read_and_says_so_to_writers(tmp_path: Path) -> None:
    LocalStore(tmp_path / "run").put_if_absent("a", b"saved")
    with read_only(tmp_path / "shown", tmp_path / "run") as folder:
        store = LocalStore(folder)
        assert store.read("a", 10) == b"saved"
        for write in (store.put_if_absent, store.replace):
            with pytest.raises(StorageError, match="Read-only file system"):
                write("b", b"new")
        with pytest.raises(StorageError, match="Read-only file system"):
            store.delete("a")
        with pytest.raises(StoreUnsuitableError, match="Read-only file system"):
            probe(store)
        assert [info.path for info in store.list("")] == ["a"]


def test_a_file_system_without_hard_links_is_refused_with_the_cause_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    with showing(tmp_path / "shown", tmp_path / "fuse", links=False) as folder:
        for ask in (probe, lambda store: store.put_if_absent("a", b"x")):
            with pytest.raises(
                StoreUnsuitableError, match=r"the fuse\.shown file system at \S+ refuses hard links .* Use a "
            ):
                ask(LocalStore(folder / "run"))
        assert list(folder.iterdir()) == []


def test_where_a_missing_name_is_remembered_it_is_still_created_only_once(tmp_path: Path) -> None:
    ours = LocalStore(tmp_path / "shown")
    ours.put_if_absent("log/1", b"first")
    with showing(tmp_path / "shown", tmp_path / "fuse", kept=3600) as folder:
        theirs = LocalStore(folder)
        assert theirs.stat("log/2") is None
        ours.put_if_absent("log/2", b"ours")
        assert theirs.stat("log/2") is None, "nothing is remembered, so this tests nothing"
        with pytest.raises(ObjectNotFoundError):
            theirs.read("log/2", 10)
        with pytest.raises(AlreadyExistsError):
            theirs.put_if_absent("log/2", b"theirs")
        assert ours.read("log/2", 10) == b"ours"
        assert theirs.read("log/1", 10) == b"first"


def test_where_a_missing_name_is_remembered_what_others_commit_is_listed_and_read_at_once(tmp_path: Path) -> None:
    """Every listing opens the folder anew, and nobody asks for a name before a listing has shown it."""
    ours = LocalStore(tmp_path / "shown")
    ours.put_if_absent("log/1", b"first")
    with showing(tmp_path / "shown", tmp_path / "fuse", kept=3600) as folder:
        theirs = LocalStore(folder)
        for number in range(2, 5):
            assert number not in numbers_in(theirs)
            ours.put_if_absent(f"log/{number}", b"%d" % number)
            assert numbers_in(theirs)[-1] == number
            assert theirs.read(f"log/{number}", 10) == b"%d" % number


def numbers_in(store: LocalStore) -> list[int]:
    return sorted(int(info.path.rpartition("/")[2]) for info in store.list("log"))


class OnAFolder(StoreConformance):
    """The kit for a LocalStore at the fixture ``root``."""

    @pytest.fixture
    def store(self, root: Path) -> Store:
        return LocalStore(root)

    @pytest.fixture
    def outside(self, root: Path) -> Outside:
        return Files(root)


@pytest.mark.wide(3)
class TestLocalStoreOnFuse(OnAFolder):
    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[Path]:
        (tmp_path / "shown").mkdir()
        with showing(tmp_path / "shown", tmp_path / "fuse") as folder:
            yield folder / "run"


class TestLocalStoreOnAnOverlay(OnAFolder):
    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[Path]:
        with overlay(tmp_path / "overlay", tmp_path / "layers") as folder:
            yield folder / "run"


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    with disk(folder / "disk", request.param, folder / "image") as mounted:
        yield mounted


class TestLocalStoreOnADisk(OnAFolder):
    @pytest.fixture
    def root(self, mounted: Path) -> Path:
        return mounted / uuid.uuid4().hex
