"""``distckpt gc``: what is dead goes, by the coordinator's own rules; what a job may need stays."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from distckpt.cli import collecting, main
from distckpt.directory.by_hand import Hand
from distckpt.directory.collect import Survey, delete
from distckpt.directory.log import read_tail
from distckpt.directory.pins import pins
from distckpt.errors import FencedError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore, MemoryStore
from tests.support.checkpoints import append_state
from tests.support.clock import Clock
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    attempt_folder,
    files,
    lease_on,
    leftovers,
    mount,
    mounting,
    numbers,
    on_disk,
    run,
    settled,
)


def call(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, [str(argument) for argument in arguments])


def found(*arguments: str | Path) -> dict[str, list[Any]]:
    result = call("gc", *arguments, "--json")
    assert result.exit_code == 0, result.output
    shown: dict[str, list[Any]] = json.loads(result.stdout)
    return shown


def put(path: Path, size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - 7200,) * 2)
    return path


def temporary(folder: Path) -> Path:
    return put(folder / f".{uuid.uuid4().hex}.tmp")


def attempt(epoch: int) -> str:
    return f"e{epoch}-{uuid.uuid4().hex}"


def begun_after(record: CheckpointRecord) -> str:
    """An attempt that the coordinator of this one began after it."""
    epoch, _, unique = record.attempt.partition("-")
    return f"{epoch}-{int(unique[:8], 16) + 100:08x}{names.claim_of(unique)}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two runs, the second of which is at epoch 2, and all kinds of garbage beside what must stay."""
    run(tmp_path, 1)
    run(tmp_path, 2)
    settled(tmp_path)
    first, second = read_tail(LocalStore(tmp_path)).state.active
    mine = put(tmp_path / "ckpt-8" / begun_after(first) / "00000-0.arrow")
    temporary(mine.parent)
    put(tmp_path / "ckpt-8" / attempt(1) / "00000-0.arrow")
    put(tmp_path / "_probe" / f"{uuid.uuid4().hex}-single", 10)
    temporary(tmp_path / "_log")
    temporary(attempt_folder(tmp_path, 1))
    put(tmp_path / "ckpt-9" / begun_after(second) / "00000-0.arrow")
    put(tmp_path / "ckpt-9" / attempt(3) / "00000-0.arrow")
    ignored = shutil.ignore_patterns(".*")
    shutil.copytree(attempt_folder(tmp_path, 1), tmp_path / "ckpt-7" / attempt(1), ignore=ignored)
    lease_on(tmp_path, 1, seconds=90)
    return tmp_path


def kinds(what: Iterable[Any]) -> list[str]:
    return sorted(one["kind"] if isinstance(one, dict) else one.kind for one in what)


def test_a_dry_run_says_what_would_go_with_size_and_age_and_changes_nothing(directory: Path) -> None:
    before = files(directory)
    shown = found(directory, "--dry-run")
    assert [(one["kind"], one["nbytes"], one["deleted"]) for one in shown["garbage"]] == [
        ("interrupted write", 1000, False),
        ("unfinished save", 1000, False),
    ]
    assert [one["path"].partition("/")[0] for one in shown["later"]] == ["ckpt-9"]
    assert kinds(shown["unsure"]) == ["interrupted write", "interrupted write", "lease", "probe", "unfinished save"]
    text = call("gc", directory, "--dry-run").stdout
    assert "2.0 h" in text
    assert "would be deleted" in text
    assert "--wait looks whether it changes, for 1.0 h" in text
    assert files(directory) == before


def test_what_can_never_be_a_checkpoint_goes_at_once_and_what_somebody_may_be_at_stays(directory: Path) -> None:
    shown = found(directory)
    assert {one["deleted"] for one in shown["garbage"]} == {True}
    assert on_disk(directory) == [1, 2, 7, 8, 9]
    assert len(list(directory.glob("ckpt-8/*"))) == 1
    assert len(list(directory.glob("ckpt-9/*"))) == 2
    for number in (1, 2):
        assert_loads(directory / f"ckpt-{number}", number)
    assert found(directory)["garbage"] == []
    assert "nothing to delete" in call("gc", directory).stdout


def test_what_is_watched_goes_when_nobody_has_touched_it_and_what_a_job_may_need_stays(directory: Path) -> None:
    store, clock = LocalStore(directory), Clock()
    survey = Survey(store, 3600.0, clock)
    what = survey.look()
    assert what.wait == 3600
    delete(what.found)
    clock.now += 90
    assert kinds(survey.look().unsure) == ["interrupted write", "probe", "unfinished save"]
    [begun] = directory.glob("ckpt-8/e1-*/00000-0.arrow")
    begun.write_bytes(b"more of it")
    clock.now += 3600
    assert (kinds(survey.look().unsure), survey.look().wait) == (["unfinished save"], 3600)
    clock.now += 3600
    what = survey.look()
    assert what.unsure == ()
    assert delete(what.found) == {}
    assert on_disk(directory) == [1, 2, 7, 9]
    assert list(store.list(names.LEASES)) == []
    for number in (1, 2):
        assert_loads(directory / f"ckpt-{number}", number)


def test_one_who_waits_does_not_wait_for_what_is_changed_all_the_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()

    ours, really = threading.current_thread(), time.sleep

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not ours:
            really(seconds)
            return
        clock.now += seconds
        for path in directory.glob("ckpt-8/e1-*/00000-0.arrow"):
            path.write_bytes(bytes(int(clock.now) % 4096))

    monkeypatch.setattr(collecting, "Survey", lambda store, age: Survey(store, age, clock))
    monkeypatch.setattr(collecting, "elapsed", clock)
    monkeypatch.setattr(time, "sleep", sleep)
    shown = found(directory, "--wait")
    assert kinds(shown["unsure"]) == ["unfinished save"]
    assert kinds(shown["garbage"]) == ["expired lease", *["interrupted write"] * 3, "probe", "unfinished save"]
    assert on_disk(directory) == [1, 2, 7, 8, 9]


def test_by_force_what_the_last_run_has_begun_goes_too_and_that_run_is_turned_away(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.saved(1)
    [record] = read_tail(LocalStore(tmp_path)).state.active
    put(tmp_path / "ckpt-2" / begun_after(record) / "00000-0.arrow")
    assert call("gc", tmp_path, "--older-than", "30s").exit_code == 2
    assert found(tmp_path)["garbage"] == []
    [gone] = found(tmp_path, "--force")["garbage"]
    assert gone["kind"] == "unfinished save"
    with pytest.raises(FencedError):
        trainer.saved(2)
    trainer.manager.close()
    run(tmp_path, 2)
    assert numbers(tmp_path) == [1, 2]


def test_retired_checkpoints_go_unless_somebody_reads_them(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lease = lease_on(tmp_path, 1, seconds=60)
    store = LocalStore(tmp_path)

    def retire(state: State) -> State:
        return msgspec.structs.replace(state, active=state.active[1:], retiring=state.active[:1])

    append_state(store, retire)
    assert found(tmp_path)["garbage"] == []
    assert found(tmp_path)["later"] == [], "it is read"
    Hand(store, read_tail(store), "test").write("claim", read_tail(store).state, time.time())
    assert found(tmp_path)["garbage"] == []
    (tmp_path / lease).unlink()
    [gone] = found(tmp_path)["garbage"]
    assert (gone["kind"], on_disk(tmp_path)) == ("retired checkpoint", [2])
    run(tmp_path, 3)
    assert read_tail(LocalStore(tmp_path)).state.retiring == ()


def test_of_a_job_that_may_run_retired_checkpoints_are_left_to_the_job(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    state = read_tail(LocalStore(tmp_path)).state
    retired = msgspec.structs.replace(state, active=state.active[1:], retiring=state.active[:1])
    append_state(LocalStore(tmp_path), lambda _: retired)
    shown = found(tmp_path)
    assert (shown["garbage"], [one["kind"] for one in shown["later"]]) == ([], ["retired checkpoint"])
    assert on_disk(tmp_path) == [1, 2]
    assert [one["deleted"] for one in found(tmp_path, "--force")["garbage"]] == [True]
    assert on_disk(tmp_path) == [2]


def test_pins_of_what_is_no_more_go_and_others_stay(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, 3)
    store = LocalStore(tmp_path)
    first, second, third = read_tail(store).state.active
    gone = attempt(1)
    for pinned, holds in ((first.attempt, False), (second.attempt, True), (third.attempt, False), (gone, True)):
        lease = Lease(2, pinned, "somebody", None, since=1.0, holds=holds)
        store.replace(names.pin_path(pinned), seal(lease))
    append_state(
        store, lambda state: msgspec.structs.replace(state, active=(third,), retiring=(first, second)), "retire"
    )
    lost = {names.pin_path(first.attempt), names.pin_path(gone)}
    clock = Clock()
    survey = Survey(store, 3600.0, clock)
    assert lost <= {one.left.path for one in survey.look().unsure}
    clock.now += 3600
    assert {one.left.path for one in survey.look().found} == lost
    delete(survey.look().found)
    assert pins(store).keys() == {second.attempt, third.attempt}


def test_what_cannot_be_deleted_is_told_and_keeps_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = LocalStore.delete

    def refusing(self: LocalStore, path: str) -> None:
        if path.startswith("ckpt-8/"):
            raise StorageError(path, "not permitted")
        delete(self, path)

    monkeypatch.setattr(LocalStore, "delete", refusing)
    result = call("gc", directory, "--force", "--older-than", "0")
    assert result.exit_code == 1
    assert "could not be deleted" in result.stdout
    assert on_disk(directory) == [1, 2, 7, 8, 9]
    assert list(LocalStore(directory).list("_probe")) == []


def test_without_a_log_or_with_a_damaged_one_nothing_goes(directory: Path) -> None:
    newest = max(path for path in (directory / names.LOG).iterdir() if path.suffix == ".json")
    newest.write_bytes(b"damaged")
    before = files(directory)
    assert call("gc", directory).exit_code == 1
    assert files(directory) == before
    shutil.rmtree(directory / names.LOG)
    result = call("gc", directory)
    assert (result.exit_code, "distckpt adopt" in result.stderr) == (1, True)
    assert on_disk(directory) == [1, 2, 7, 8, 9]


def test_nothing_is_left_of_what_was_garbage(directory: Path) -> None:
    found(directory, "--force", "--older-than", "0")
    kept = {path for path in leftovers(directory) if not path.startswith(("ckpt-7/", "ckpt-9/", names.LEASES))}
    assert kept == set()


class Remembering(MemoryStore):
    """Goes on to list folders of which nothing is left, as SeaweedFS does, and versioned buckets of moto."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[str] = set()

    def delete(self, path: str) -> None:
        self.gone.add(path)
        super().delete(path)

    def folders(self, folder: str) -> Iterator[str]:
        above = f"{folder}/" if folder else ""
        gone = {path.removeprefix(above) for path in self.gone if path.startswith(above)}
        return iter(sorted({*super().folders(folder), *(path.partition("/")[0] for path in gone if "/" in path)}))


def test_a_folder_that_a_server_lists_and_that_has_nothing_is_no_leftover() -> None:
    store = Remembering()
    with mounting():
        url = mount(store)
        run(url, 1, 2, 3, max_to_keep=1)
        assert {"ckpt-1", "ckpt-2", "ckpt-3"} <= set(store.folders(""))
        told = found(url, "--force")
        assert (told["garbage"], told["later"], told["unsure"]) == ([], [], [])
        assert "unfinished" not in call("ls", "--all", url).stdout
