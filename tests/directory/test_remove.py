"""``distckpt rm``: out of the log first, then away; and never what somebody needs."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main, removing
from distckpt.directory.by_hand import Hand
from distckpt.directory.chosen import choose_in
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.directory.remove import plan_removal, remove
from distckpt.errors import CheckpointNotFoundError, CoordinatorError, FencedError, StorageError
from distckpt.format import names
from distckpt.storage import LocalStore
from distckpt.testing.faults import Call, Fault
from distckpt.testing.faulty import FaultyStore
from tests.support.clock import Clock
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    attempt_folder,
    files,
    lease_on,
    numbers,
    on_disk,
    run,
    settled,
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    run(tmp_path, 1, 2, 3)
    settled(tmp_path)
    return tmp_path


def test_what_is_removed_is_gone_and_the_job_goes_on_from_the_rest(directory: Path) -> None:
    result = call("rm", directory / "ckpt-1", directory / "ckpt-2", "--force", "-y")
    assert result.exit_code == 0, result.output
    assert "removed 2 checkpoints" in result.stdout
    assert (numbers(directory), on_disk(directory)) == ([3], [3])
    assert read_tail(LocalStore(directory)).state.retiring == ()
    assert distckpt.latest_checkpoint(directory) == f"{directory}/ckpt-3"
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-3"
        trainer.saved(4)
    assert_loads(directory / "ckpt-4", 4)
    assert_sound_log(directory)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("ckpt-1", "-y"), "pass --force"),
        (("ckpt-1", "--force"), "pass -y"),
        (("ckpt-9", "--force", "-y"), "not a committed checkpoint"),
        (("_log", "--force", "-y"), "not the path of a checkpoint"),
    ],
)
def test_what_is_not_sure_is_refused(directory: Path, arguments: tuple[str, ...], reason: str) -> None:
    before = files(directory)
    result = call("rm", directory / arguments[0], *arguments[1:])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert files(directory) == before


def test_the_newest_needs_force_also_when_no_job_can_run(directory: Path) -> None:
    call("rm", directory / "ckpt-1", "--force", "-y")
    assert "the newest" in call("rm", directory / "ckpt-3", "-y").stderr
    assert call("rm", directory / "ckpt-2", "-y").exit_code == 0
    assert call("rm", directory / "ckpt-3", "-y", "--force").exit_code == 0
    with pytest.raises(CheckpointNotFoundError):
        distckpt.open(directory)


def test_a_directory_is_told_that_it_is_one_and_which_checkpoint_it_has(tmp_path: Path) -> None:
    path = Path(distckpt.Checkpoint(state={"a": 1}).save(tmp_path / "v"))
    result = call("rm", path, "-y", "--force")
    assert result.exit_code == 2
    assert (
        f"a directory with checkpoints, and none itself. Give the path of one, such as {path}/saved-1." in result.stderr
    )
    assert "delete the folder" in result.stderr
    result = call("rm", path / "saved-1", "-y", "--force")
    assert (result.exit_code, numbers(path)) == (0, []), result.output


def test_what_is_pinned_or_read_is_refused_even_with_force(directory: Path) -> None:
    call("pin", directory / "ckpt-1")
    lease_on(directory, 2, seconds=60)
    for number, reason in ((1, "unpin"), (2, "a lease")):
        result = call("rm", directory / f"ckpt-{number}", "--force", "-y")
        assert result.exit_code == 2
        assert reason in result.stderr
    assert numbers(directory) == [1, 2, 3]


def test_a_dry_run_changes_nothing(directory: Path) -> None:
    before = files(directory)
    result = call("rm", directory / "ckpt-1", "--force", "--dry-run", "--json")
    [one] = json.loads(result.stdout)["checkpoints"]
    assert (one["checkpoint"], one["deleted"]) == ("ckpt-1", False)
    assert files(directory) == before


def test_a_job_that_still_runs_is_fenced(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.saved(1)
    trainer.saved(2)
    assert call("rm", tmp_path / "ckpt-1", "--force", "-y").exit_code == 0
    with pytest.raises(FencedError):
        trainer.saved(3)
    trainer.manager.close()
    assert numbers(tmp_path) == [2]


@dataclass
class GoneAt:
    """Everything fails from the write with that number on, as when the process ends there."""

    write: int

    def fault(self, call: Call) -> Fault | None:
        self.write -= call.operation in ("put_if_absent", "replace", "delete")
        return Fault.GONE if self.write < 0 else None


def test_killed_at_any_write_nothing_half_is_read_and_what_is_left_goes_later(directory: Path, tmp_path: Path) -> None:
    half = 0
    for write in range(100):
        copy = tmp_path / f"copy-{write}"
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("copy-*"))
        store = FaultyStore(LocalStore(copy), GoneAt(write))
        tail, records = plan_removal([choose_in(LocalStore(copy), "ckpt-1")], True, 0.0, Leases(store))
        with contextlib.suppress(StorageError, CoordinatorError):
            remove(store, tail, records, lambda: 1.0, Leases(store))
        if 1 in numbers(copy):
            assert_loads(copy / "ckpt-1", 1)
            continue
        with pytest.raises(CheckpointNotFoundError):
            distckpt.open(copy / "ckpt-1")
        half += on_disk(copy) == [1, 2, 3]
        if half == 1:
            with Trainer(copy) as trainer:
                trainer.manager.restore_or_initialize()
                trainer.saved(4)
                settled(copy)
            assert read_tail(LocalStore(copy)).state.retiring == ()
        else:
            assert call("gc", copy).exit_code == 0
        assert on_disk(copy)[:2] == [2, 3]
        if not store.calls[-1].fault:
            break
    assert half > 2
    assert write < 99, "it never came to its end"


def test_what_a_killed_reader_had_leased_goes_when_that_has_been_watched_for_long_enough(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(removing, "Leases", lambda store: Leases(store, clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    lease_on(directory, 1, seconds=95)
    refused = call("rm", directory / "ckpt-1", "--force", "-y")
    assert (refused.exit_code, "pass --wait" in refused.stderr) == (2, True)
    assert call("rm", directory / "ckpt-1", "--force", "-y", "--wait").exit_code == 0
    assert clock.now == 1100
    assert (numbers(directory), on_disk(directory)) == ([2, 3], [2, 3])


def test_what_somebody_begins_to_read_meanwhile_is_out_of_the_log_and_stays_for_now(directory: Path) -> None:
    store = LocalStore(directory)
    tail, records = plan_removal([choose_in(store, "ckpt-1")], True, 0.0, Leases(store))
    lease_on(directory, 1, seconds=60)
    [removed] = remove(store, tail, records, lambda: 1.0, Leases(store))
    assert "read" in removed.left
    assert (numbers(directory), on_disk(directory)) == ([2, 3], [1, 2, 3])


def test_a_save_that_only_lacks_its_entry_is_not_lost(directory: Path) -> None:
    """An entry by hand would keep the next coordinator from committing it."""
    sealed = attempt_folder(directory, 3)
    shutil.copytree(directory / "_log", directory.with_name("log"))
    newest = max((directory / "_log").iterdir())
    while json.loads(newest.read_bytes())["state"]["active"][-1]["number"] == 3:
        newest.unlink()
        newest = max((directory / "_log").iterdir())
    result = call("rm", directory / "ckpt-1", "--force", "-y")
    assert (result.exit_code, sealed.exists()) == (2, True)
    assert "only lacks its entry" in result.stderr


def test_somebody_else_who_writes_to_the_log_meanwhile_wins(directory: Path) -> None:
    store = LocalStore(directory)
    tail, records = plan_removal([choose_in(store, "ckpt-1")], True, 0.0, Leases(store))
    Hand(store, tail, "test").write("claim", tail.state, 1.0)
    with pytest.raises(CoordinatorError, match="somebody else"):
        remove(store, tail, records, lambda: 2.0, Leases(store))
    assert on_disk(directory) == [1, 2, 3]
    assert max(map(names.entry_seq, files(directory)), key=lambda seq: seq or 0) == tail.seq + 1
