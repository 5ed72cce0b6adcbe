"""From what a user writes as a directory to a store."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli.app import main
from distckpt.errors import CheckpointNotFoundError, StoreUnsuitableError
from distckpt.storage import MemoryStore, above, canonical, join, open_store, split_path


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical("runs/7/") == str(tmp_path / "runs/7")
    assert canonical(Path("runs") / "7") == str(tmp_path / "runs/7")
    assert canonical(".") == str(tmp_path)


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert canonical("~/runs/7") == "/home/someone/runs/7"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/data/run-7", "/data/run-7"),
        ("/data//run-7/", "/data/run-7"),
        ("/data/./x/../run-7", "/data/run-7"),
        ("/", "/"),
        ("file:///data/run-7/", "/data/run-7"),
        ("file://localhost/data/run-7", "/data/run-7"),
        ("file:/data/run-7", "/data/run-7"),
        ("FILE:///data/run-7", "/data/run-7"),
        (Path("/data/run 7").as_uri(), "/data/run 7"),
        ("memory://run-7/", "memory://run-7"),
        ("memory://a//b", "memory://a/b"),
        ("GS://Bucket/run-7//", "gs://Bucket/run-7"),
    ],
)
def test_one_directory_has_one_spelling(given: str, expected: str) -> None:
    assert canonical(given) == expected
    assert canonical(expected) == expected


def test_symbolic_links_are_followed_as_far_as_there_is_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "latest").symlink_to("link/run")
    monkeypatch.chdir(tmp_path / "link" / "run")
    run = str(tmp_path / "disk" / "run")
    for spelling in (".", f"{tmp_path}/latest/", f"file://{tmp_path}/latest", "../../latest", tmp_path / "link/run"):
        assert canonical(spelling) == run
    assert canonical(tmp_path / "latest" / "ckpt-1") == f"{run}/ckpt-1"
    assert canonical(tmp_path / "link" / "later" / "run") == f"{tmp_path}/disk/later/run"
    assert not (tmp_path / "disk" / "later").exists()


def test_what_a_path_means_does_not_change_with_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run-7", "run-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").symlink_to("run-7")
    monkeypatch.chdir(tmp_path)
    store = open_store("latest")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("run-8")
    monkeypatch.chdir("/")
    store.put_if_absent("a", b"1")
    assert store.url == f"{tmp_path}/run-7"
    assert (tmp_path / "run-7" / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    "given", ["", "a\0b", "gs://", "gs:///", "gs://bucket/../other", "file://host/data", "file://x"]
)
def test_what_is_no_directory_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"directory|host"):
        canonical(given)


def test_a_url_that_went_through_pathlib_is_recognized() -> None:
    with pytest.raises(ValueError, match="pass the URL as a str"):
        canonical(Path("gs://bucket/run-7"))


def test_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        canonical(b"/data")  # type: ignore[arg-type]


def test_local_directories_open_without_being_touched(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    assert store.url == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    again = open_store(f"file://{tmp_path}/run", {"direct_io": False})
    store.put_if_absent("a", b"1")
    assert again.read("a", 10) == b"1"


def test_memory_directories_are_shared_by_name() -> None:
    store = open_store("memory://test-location/run-7/")
    open_store("memory://test-location/run-7").replace("a", b"1")
    assert store.read("a", 1) == MemoryStore.named("test-location/run-7").read("a", 1) == b"1"
    assert store.url == "memory://test-location/run-7"


@pytest.mark.parametrize("url", ["nothing://host/run", "simplecache::gs://bucket/run"])
def test_an_unknown_scheme_is_named(url: str) -> None:
    scheme = url.partition("://")[0]
    with pytest.raises(StoreUnsuitableError, match=f"no store for {scheme}://"):
        open_store(url)


@pytest.mark.parametrize("directory", ["/data/run", "memory://run"])
def test_an_unknown_option_is_named(directory: str) -> None:
    with pytest.raises(ValueError, match="tokne"):
        open_store(directory, {"tokne": "secret"})


@pytest.mark.parametrize(
    ("path", "directory", "folder"),
    [
        ("/data/run-7/ckpt-42", "/data/run-7", "ckpt-42"),
        ("/data/run-7/ckpt-42/", "/data/run-7", "ckpt-42"),
        ("/ckpt-42", "/", "ckpt-42"),
        ("file:///data/ckpt-42", "/data", "ckpt-42"),
        ("gs://bucket/ckpt-42", "gs://bucket", "ckpt-42"),
        ("gs://bucket/run-7/ckpt-42/", "gs://bucket/run-7", "ckpt-42"),
        ("memory://run/ckpt-42", "memory://run", "ckpt-42"),
    ],
)
def test_a_checkpoint_path_comes_apart_and_together_again(path: str, directory: str, folder: str) -> None:
    assert split_path(path) == (directory, folder)
    assert join(directory, folder) == canonical(path)


@pytest.mark.parametrize("path", ["/", "gs://bucket", "memory://run"])
def test_what_has_nothing_above_it_does_not_come_apart(path: str) -> None:
    with pytest.raises(ValueError, match="no directory above"):
        split_path(path)


def test_join_takes_any_number_of_parts() -> None:
    assert join("/") == "/"
    assert join("/", "a", "b") == "/a/b"
    assert join("gs://bucket/run", "ckpt-1", "e1-0") == "gs://bucket/run/ckpt-1/e1-0"


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("/data/run-7", ("/data", "run-7")),
        ("/run-7", ("/", "run-7")),
        ("/", None),
        ("s3://runs-2024", None),
        ("gs://runs-2024", None),
        ("s3://runs-2024/ckpt-1", ("s3://runs-2024", "ckpt-1")),
    ],
)
def test_above_a_bucket_is_nothing_whatever_it_is_called(location: str, found: tuple[str, str] | None) -> None:
    assert above(location) == found


def test_a_root_that_is_called_like_a_checkpoint_is_a_directory(tmp_path: Path) -> None:
    root = MemoryStore.named(f"runs-{random.randrange(1 << 40)}").url
    for number in (1, 2):
        with distckpt.CheckpointManager(distckpt.Checkpoint(step=number), root) as manager:
            manager.restore_or_initialize()
            manager.save(number).result(30)
    assert distckpt.load(root)["step"] == 1
    assert distckpt.Checkpoint(step=0).restore(f"{root}/ckpt-2").is_complete
    with distckpt.watch(root, timeout=0) as watch:
        assert [checkpoint.number for checkpoint in watch] == [2]
    assert distckpt.Checkpoint(step=3).write(f"{root}/best") == f"{root}/best"
    for command in (
        ("show", root),
        ("verify", root),
        ("du", root),
        ("cp", root, str(tmp_path / "copy")),
        ("pin", root),
    ):
        assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0, command
    empty = MemoryStore.named(f"runs-{random.randrange(1 << 40)}").url
    with pytest.raises(CheckpointNotFoundError):
        distckpt.load(empty)
    assert CliRunner().invoke(main, ["show", empty]).exit_code == 2


@pytest.mark.parametrize("prefix", ["s3://mine", "gs://mine/", "s3://mine/best/", "memory://mine", "best/"])
def test_a_prefix_that_is_a_place_is_refused_by_save(prefix: str) -> None:
    """A number after it would make another bucket of it, or a name that is nothing but a number."""
    with pytest.raises(
        ValueError, match=rf"is a place and no beginning of a name.*give {prefix.rstrip('/')}/ckpt, say"
    ):
        distckpt.Checkpoint(step=1).save(prefix)
