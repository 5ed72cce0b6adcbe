"""Shards in another store than log and manifests."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import distckpt
from distckpt import CheckpointManager, errors
from distckpt.cli.app import main
from distckpt.coordinator.machine.actions import CollectGarbage
from distckpt.coordinator.shell.housekeeping import collect_garbage
from distckpt.directory.garbage import Watch
from distckpt.errors import DataElsewhereError, StorageError, StoreUnsuitableError
from distckpt.format import names
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, SplitStore, Store, open_store, placed
from distckpt.storage.names import holds_shards, is_lasting, is_shard
from distckpt.storage.probe import probe
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import Outside
from distckpt.transfer.reader import LOCAL, REMOTE, pace_of
from tests.support.clock import Clock
from tests.support.small_runs import Trainer, holds, mount, mounting, numbers, records, run, target

HEX = "0" * 32


class TestSplitStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return SplitStore(LocalStore(tmp_path / "home"), MemoryStore())

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Outside:
        return _Folder(tmp_path / "home")


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, path: str) -> bytes | None:
        file = self._folder / path
        return file.read_bytes() if file.exists() else None

    def write(self, path: str, data: bytes) -> None:
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def test_stores_know_the_names_that_the_format_makes() -> None:
    for attempt in (names.attempt_folder("a-b", 42, f"e17-{HEX}"), f"e17-{HEX}"):
        shard = f"{attempt}/{names.shard_name(123456, 7)}"
        assert (is_shard(shard), is_lasting(shard), holds_shards(attempt)) == (True, True, True)
        index = f"{attempt}/{names.INDEX}"
        assert (is_shard(index), is_lasting(index)) == (False, True)
        for other in (names.MANIFEST, names.EXPORT, f"{names.export_folder(HEX)}/m/{names.WEIGHTS}"):
            assert not is_lasting(f"{attempt}/{other}")
    for path in (names.STATE_FILE, names.entry_path(1), names.lease_path("a"), names.shard_name(0, 0)):
        assert not is_lasting(path)
    assert not holds_shards("ckpt-1")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def shards(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*-*.arrow")}


def test_shards_are_in_the_store_for_data_and_all_else_in_the_directory(home: Path, data: Path) -> None:
    run(home, 1, 2, 3, 4, max_to_keep=2, data=data)
    assert shards(home) == set()
    assert len(shards(data)) == 2
    assert {path for path in data.rglob("*") if path.is_file()} == {data / path for path in shards(data)}
    with Trainer(home, max_to_keep=2, data=str(data)) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{home}/ckpt-4"
        assert holds(trainer.checkpoint.state, 4)
    with distckpt.open(home, data=data) as reader:
        assert reader.verify().damages == ()
        assert holds(reader.load("state"), 4)
    assert holds(distckpt.load(home / "ckpt-3", "state", data=data), 3)
    assert distckpt.load_variable(home, "state.nested.step", data=data) == 4
    again = target()
    again.restore(home / "ckpt-3", data=data)
    assert holds(again.state, 3)


def test_who_was_not_told_where_shards_are_is_told_that_and_not_that_they_are_damaged(home: Path, data: Path) -> None:
    run(home, 1, 2, data=data)
    assert distckpt.latest_checkpoint(home) == f"{home}/ckpt-2"
    assert distckpt.list_variables(home)
    before = target()
    for wrong in (None, home.parent / "other"):
        told = "in another place than the directory" if wrong is None else f"not in {wrong}"
        with pytest.raises(DataElsewhereError, match=f"its shards are {told}. Give data="):
            distckpt.load(home, data=wrong)
        with pytest.raises(DataElsewhereError):
            before.restore(home, data=wrong)
        with pytest.raises(DataElsewhereError):
            CheckpointManager(target(), home, data=wrong)
    assert holds(before.state, 65535)
    result = CliRunner().invoke(main, ["verify", str(home)])
    assert result.exit_code == 2
    assert "--data" in result.output
    for order in (["--data", str(data), "-o", "direct_io=false"], ["-o", "direct_io=false", "--data", str(data)]):
        result = CliRunner().invoke(main, ["verify", str(home), *order])
        assert (result.exit_code, result.exception) == (0, None), result.output
    assert len(shards(data)) == 2


@pytest.mark.parametrize(
    "command",
    [("rm", "run/ckpt-1", "-y", "--force"), ("rm", "run/ckpt-1", "--dry-run", "--force"), ("cp", "run", "copy")],
)
def test_what_is_not_told_where_shards_are_neither_removes_nor_copies_anything(
    home: Path, data: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    run(home, 1, 2, data=data)
    monkeypatch.chdir(home.parent)
    before = records(home)
    refused = CliRunner().invoke(main, list(command))
    assert refused.exit_code == 2
    assert "its shards are in another place than the directory. Give data=" in refused.stderr
    assert (records(home), len(shards(data)), (home.parent / "copy").exists()) == (before, 2, False)
    done = CliRunner().invoke(main, [*command, "--data", str(data)])
    assert (done.exit_code, done.exception) == (0, None), done.output


def test_a_command_takes_no_place_for_shards_where_there_are_none(home: Path) -> None:
    for command, flag in (("export", "--to-data"), ("import", "--data")):
        refused = CliRunner().invoke(main, [command, str(home), str(home.parent / "there"), flag, "elsewhere"])
        assert refused.exit_code == 2
        assert f"No such option '{flag}'" in refused.stderr or f"No such option: {flag}" in refused.stderr


def test_what_lost_its_manifest_is_removed_though_nobody_can_tell_where_its_shards_are(home: Path, data: Path) -> None:
    run(home, 1, 2, data=data)
    next((home / "ckpt-1").glob(f"*/{names.MANIFEST}")).unlink()
    done = CliRunner().invoke(main, ["rm", f"{home}/ckpt-1", "-y", "--force", "--data", str(data)])
    assert (done.exit_code, numbers(home), len(shards(data))) == (0, [2], 1), done.output


def test_a_folder_with_its_shards_elsewhere_keeps_no_other_from_being_adopted(home: Path, data: Path) -> None:
    run(home, 1)
    run(home.parent / "other", 2, data=data)
    (home.parent / "other" / "ckpt-2").rename(home / "ckpt-2")
    shutil.rmtree(home / names.LOG)
    done = CliRunner().invoke(main, ["adopt", str(home)])
    assert (done.exit_code, numbers(home)) == (0, [1]), done.output
    assert "passed over" in done.stdout
    assert "--data" in done.stdout
    done = CliRunner().invoke(main, ["adopt", str(home), "--force", "--data", str(data)])
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert holds(distckpt.load(home / "ckpt-2", "state", data=data), 2)


def test_shards_that_were_moved_are_found_where_they_are(home: Path, data: Path, tmp_path: Path) -> None:
    run(home, 1, data=data)
    data.rename(tmp_path / "moved")
    assert holds(distckpt.load(home, "state", data=tmp_path / "moved"), 1)
    run(home, 2, data=tmp_path / "moved")
    (shard,) = (tmp_path / "moved" / "ckpt-1").rglob("*.arrow")
    shard.rename(next((home / "ckpt-1").glob("e*")) / shard.name)
    assert holds(distckpt.load(home / "ckpt-1", "state"), 1)


def test_a_run_that_had_its_shards_in_the_directory_goes_on_with_another_place_for_them(home: Path, data: Path) -> None:
    run(home, 1, 2)
    with Trainer(home, max_to_keep=2, data=data) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{home}/ckpt-2"
        trainer.saved(3)
    assert holds(distckpt.load(home / "ckpt-2", "state", data=data), 2)
    run(home, 4, 5, max_to_keep=2, data=data)
    assert (len(shards(home)), len(shards(data))) == (0, 2)


class Breaking(MemoryStore):
    """Does nothing while it is down."""

    is_down = False

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        if self.is_down:
            raise StorageError(self.url, "it is down")
        return super().list(folder)

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        if self.is_down:
            raise StorageError(self.url, "it is down")
        return super().put_unique(path, size, sections)


def test_a_store_for_data_that_fails_fails_the_save_and_loses_nothing(home: Path) -> None:
    data = Breaking()
    with mounting(), Trainer(home, max_to_keep=1, data=mount(data)) as trainer:
        trainer.saved(1)
        data.is_down = True
        with pytest.raises(StorageError, match="it is down"):
            trainer.saved(2)
        data.is_down = False
        trainer.saved(3)
        data.is_down = True
        trainer.manager.wait()
    assert numbers(home) == [3]
    assert [path for path in data.objects if path.startswith("ckpt-3/")]
    data.is_down = False
    with mounting():
        run(home, 4, max_to_keep=1, data=mount(data))
    assert {path.partition("/")[0] for path in data.objects} == {"ckpt-4"}


def test_directories_share_a_place_for_shards_and_each_collects_its_own_garbage(home: Path, data: Path) -> None:
    other = home.parent / "other"
    run(other, 1, data=data)
    run(home, 1, data=data)
    store = open_store(home, {"data": str(data)})
    claim = names.claim_of(records(home)[0].attempt)
    dead = f"ckpt-9/e1-{'7' * 8}{claim}/00000-0.arrow"
    store.put_unique(dead, 3, [memoryview(b"abc")])
    kept = shards(data) - {dead}
    known = frozenset(record.attempt for record in records(home))
    action = CollectGarbage("ckpt", epoch=9, known=known, live=frozenset(), failed=frozenset(), urgent=False)
    clock = Clock()
    watch = Watch(store, clock)
    assert collect_garbage(store, action, 3600.0, watch) == 0
    clock.now += 60
    assert collect_garbage(store, action, 3600.0, watch) == 1
    assert shards(data) == kept
    assert holds(distckpt.load(other, "state", data=data), 1)


def test_what_is_asked_of_the_directory_alone_needs_no_store_for_data(home: Path, data: Path) -> None:
    run(home, 1, data=data)
    data.rename(home.parent / "away")
    data.write_text("no folder")
    assert distckpt.latest_checkpoint(home, storage_options={"data": str(data)}) == f"{home}/ckpt-1"
    assert list(distckpt.checkpoints_iterator(home, timeout=0, storage_options={"data": str(data)}))
    with pytest.raises(errors.DistckptError):
        CheckpointManager(target(), home, data=data)
    assert records(home)[0].number == 1


def test_of_a_store_for_data_only_that_is_asked_which_it_must_do(home: Path) -> None:
    class Rapid(MemoryStore):
        """Creating overwrites."""

        def put_if_absent(self, path: str, data: bytes) -> None:
            self.replace(path, data)

    with pytest.raises(StoreUnsuitableError):
        probe(Rapid())
    probe(SplitStore(LocalStore(home), Rapid()))

    class Forgetful(MemoryStore):
        def list(self, folder: str) -> Iterator[Any]:
            return iter(())

    with pytest.raises(StoreUnsuitableError, match="missing from the listing"):
        probe(SplitStore(LocalStore(home), Forgetful()))


def test_a_relative_place_is_the_same_for_every_process_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = placed({"direct_io": False}, data="shards", cache_dir="cache")
    assert options == {"direct_io": False, "data": str(tmp_path / "shards"), "cache_dir": str(tmp_path / "cache")}
    assert placed({"data": "gs://bucket/run/"}) == {"data": "gs://bucket/run"}
    assert placed(None) is None


def test_wrong_places_for_data_are_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="another place"):
        open_store(home, {"data": f"{home}/"})
    with pytest.raises(ValueError, match="there is none"):
        open_store(home, {"data_options": {"token": "anon"}})
    with pytest.raises(StorageError):
        open_store(home, {"data": "nonsense://a/b"})


def test_what_is_far_is_asked_as_what_is_far(tmp_path: Path) -> None:
    """However near the log is: many requests at a time, and one listing in place of a look at each shard."""
    home, far = LocalStore(tmp_path), MemoryStore.named("far")
    assert pace_of(SplitStore(home, far)) is REMOTE
    assert pace_of(SplitStore(far, home)) is LOCAL
