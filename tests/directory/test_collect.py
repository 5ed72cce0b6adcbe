"""``distckpt gc``: what is dead goes, by the coordinator's own rules; what a job may need stays."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.by_hand import Hand
from distckpt.directory.log import read_tail
from distckpt.directory.pins import pins
from distckpt.errors import FencedError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import State
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore
from tests.support.checkpoints import append_state
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    attempt_folder,
    files,
    lease_on,
    leftovers,
    numbers,
    on_disk,
    run,
    settled,
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def found(*arguments: str | Path) -> dict[str, list[Any]]:
    result = call("gc", *arguments, "--json")
    assert result.exit_code == 0, result.output
    shown: dict[str, list[Any]] = json.loads(result.stdout)
    return shown


def put(path: Path, age: float = 7200.0, size: int = 1000) -> Path:
    """A file that nobody has touched for so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def temporary(folder: Path, age: float = 7200.0) -> Path:
    return put(folder / f".{uuid.uuid4().hex}.tmp", age)


def attempt(epoch: int) -> str:
    return f"e{epoch}-{uuid.uuid4().hex}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two runs, the second of which is at epoch 2, and all kinds of garbage beside what must stay."""
    run(tmp_path, 1)
    run(tmp_path, 2)
    settled(tmp_path)
    for age in (7200.0, 60.0):
        put(tmp_path / "ckpt-8" / attempt(1) / "00000-0.arrow", age)
        put(tmp_path / "_probe" / f"{uuid.uuid4().hex}-single", age, 10)
        temporary(tmp_path / "_log", age)
        temporary(attempt_folder(tmp_path, 1), age)
    put(tmp_path / "ckpt-9" / attempt(2) / "00000-0.arrow")
    put(tmp_path / "ckpt-9" / attempt(3) / "00000-0.arrow")
    ignored = shutil.ignore_patterns(".*")
    shutil.copytree(attempt_folder(tmp_path, 1), tmp_path / "ckpt-7" / attempt(1), ignore=ignored)
    lease_on(tmp_path, 1, seconds=-1)
    return tmp_path


def test_a_dry_run_says_what_would_go_with_size_and_age_and_changes_nothing(directory: Path) -> None:
    before = files(directory)
    shown = found(directory, "--dry-run")
    kinds = sorted(
        (one["kind"], one["nbytes"], one["deleted"]) for one in shown["garbage"] if one["nbytes"] in (10, 1000)
    )
    assert kinds == [
        ("interrupted write", 1000, False),
        ("interrupted write", 1000, False),
        ("probe", 10, False),
        ("unfinished save", 1000, False),
    ]
    assert [one["path"].partition("/")[0] for one in shown["later"]] == ["ckpt-9"]
    assert "expired lease" in {one["kind"] for one in shown["garbage"]}
    text = call("gc", directory, "--dry-run").stdout
    assert "2.0 h" in text
    assert "would be deleted" in text
    assert files(directory) == before


def test_what_is_dead_goes_and_what_a_job_may_need_stays(directory: Path) -> None:
    shown = found(directory)
    assert {one["deleted"] for one in shown["garbage"]} == {True}
    assert on_disk(directory) == [1, 2, 7, 8, 9]
    assert len(list(directory.glob("ckpt-8/*"))) == len(list(directory.glob("_log/.*"))) == 1
    assert len(list(directory.glob("ckpt-9/*"))) == 2
    for number in (1, 2):
        assert_loads(directory / f"ckpt-{number}", number)
    assert found(directory)["garbage"] == []
    assert "nothing to delete" in call("gc", directory).stdout


def test_by_force_what_the_last_run_has_begun_goes_too_and_that_run_is_turned_away(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.saved(1)
    put(tmp_path / "ckpt-2" / attempt(1) / "00000-0.arrow", 60)
    assert found(tmp_path, "--force")["garbage"] == []
    assert call("gc", tmp_path, "--older-than", "30s").exit_code == 2
    [gone] = found(tmp_path, "--force", "--older-than", "30s")["garbage"]
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
    assert {one["path"] for one in found(tmp_path)["garbage"]} == {names.pin_path(first.attempt), names.pin_path(gone)}
    assert pins(store).keys() == {second.attempt, third.attempt}


def test_what_cannot_be_deleted_is_told_and_keeps_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = LocalStore.delete

    def refusing(self: LocalStore, path: str) -> None:
        if path.startswith("_probe/"):
            raise StorageError(path, "not permitted")
        delete(self, path)

    monkeypatch.setattr(LocalStore, "delete", refusing)
    result = call("gc", directory)
    assert result.exit_code == 1
    assert "could not be deleted" in result.stdout
    assert on_disk(directory) == [1, 2, 7, 8, 9]


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
    kept = {path for path in leftovers(directory) if not path.startswith(("ckpt-7/", "ckpt-9/"))}
    assert kept == set()
