"""``distckpt adopt``: a log for checkpoints that have none, and a place in the log for those that were copied here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main
from distckpt.cli.verifying import check
from distckpt.directory.adopt import adopt, survey
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorError, FencedError, LogMissingError, StaleRunError
from distckpt.format import names
from distckpt.format.json.log import State
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore, open_store
from tests.support.checkpoints import append_state
from tests.support.damage import flip
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    attempt_folder,
    entries,
    files,
    holds,
    numbers,
    on_disk,
    run,
)


def cli(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, args)))


def fates(directory: Path, *args: str) -> dict[str, str]:
    """What ``adopt --json`` says of each checkpoint folder."""
    result = cli("adopt", "--json", *args, directory)
    assert result.exit_code in (0, 1), result.output
    return {one["checkpoint"]: one["fate"] for one in json.loads(result.stdout)["checkpoints"]}


def state_of(directory: Path) -> State:
    return read_tail(LocalStore(directory)).state


def lose_log(directory: Path) -> None:
    shutil.rmtree(directory / names.LOG)


def checkpoint_files(directory: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    return {path: content for path, content in files(directory).items() if path.startswith("ckpt-")}


# ---- a log that was deleted ---------------------------------------------------------------------------------------------


def test_after_a_lost_log_is_adopted_all_is_as_before(tmp_path: Path) -> None:
    """Save order, what is preserved, and retention: a run goes on as if nothing had happened."""
    run(tmp_path, 9, 3, 20, 7, max_to_keep=2, keep_checkpoint_every_n_hours=1e-9)
    before, content = state_of(tmp_path), checkpoint_files(tmp_path)
    assert [record.number for record in before.preserved] == [9, 3]
    lose_log(tmp_path)
    result = cli("adopt", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "the newest is ckpt-7" in result.stdout
    after = state_of(tmp_path)
    assert (after.active, after.preserved) == (before.active, before.preserved)
    assert after.last_preserved_timestamp == before.last_preserved_timestamp
    assert checkpoint_files(tmp_path) == content
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-7"
    assert cli("verify", tmp_path).exit_code == 0
    with Trainer(tmp_path, max_to_keep=2) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/ckpt-7"
        assert holds(trainer.checkpoint.state, 7)
        trainer.saved(8)
    assert numbers(tmp_path) == [7, 8]
    assert on_disk(tmp_path) == [3, 7, 8, 9]
    for number in (3, 7, 8, 9):
        assert_loads(tmp_path / f"ckpt-{number}", number)
    assert_sound_log(tmp_path)


def test_without_the_state_file_all_are_active_and_in_save_order(tmp_path: Path) -> None:
    for number in (5, 2, 8):  # three managers: three epochs
        run(tmp_path, number)
    lose_log(tmp_path)
    (tmp_path / names.STATE_FILE).unlink()
    assert fates(tmp_path) == {"ckpt-5": "active", "ckpt-2": "active", "ckpt-8": "active"}
    assert numbers(tmp_path) == [5, 2, 8]
    state = distckpt.get_checkpoint_state(tmp_path)
    assert state is not None
    assert state.model_checkpoint_path == f"{tmp_path}/ckpt-8"
    with Trainer(tmp_path, max_to_keep=2) as trainer:
        assert [Path(path).name for path in trainer.manager.checkpoints] == ["ckpt-5", "ckpt-2", "ckpt-8"]
        trainer.saved(9)
    assert on_disk(tmp_path) == [8, 9]
    assert_sound_log(tmp_path)


def test_the_epoch_is_later_than_any_before_so_that_nothing_old_comes_back(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        run(tmp_path, number)
    newest = max(names.attempt_epoch(record.attempt) for record in state_of(tmp_path).active)
    lose_log(tmp_path)
    cli("adopt", tmp_path)
    [entry] = entries(tmp_path)
    assert (entry.seq, entry.kind) == (1, "claim")
    assert entry.epoch > newest
    run(tmp_path, 4)
    assert numbers(tmp_path) == [1, 2, 3, 4]


def test_a_state_file_that_says_nothing_does_no_harm(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lose_log(tmp_path)
    for text in (b"\xff", b"nonsense", b'model_checkpoint_path: "x"\nlast_preserved_timestamp: nan\n'):
        (tmp_path / names.STATE_FILE).write_bytes(text)
        assert fates(tmp_path, "--dry-run") == {"ckpt-1": "active", "ckpt-2": "active"}
    assert cli("adopt", tmp_path).exit_code == 0
    assert numbers(tmp_path) == [1, 2]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lose_log(tmp_path)
    before = files(tmp_path)
    result = cli("adopt", "--dry-run", tmp_path)
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines() if "active" in line] == [
        ["ckpt-1", "active"],
        ["ckpt-2", "active"],
    ]
    assert "nothing was written" in result.stdout
    told = json.loads(cli("adopt", "--dry-run", "--json", tmp_path).stdout)
    assert told["entry"] is None
    assert [one["record"]["number"] for one in told["checkpoints"]] == [1, 2]
    assert files(tmp_path) == before
    with pytest.raises(LogMissingError):
        distckpt.latest_checkpoint(tmp_path)


def test_what_is_damaged_is_told_and_left_alone(tmp_path: Path) -> None:
    run(tmp_path, *range(1, 8), max_to_keep=None)
    shard, index, manifest, cut = (attempt_folder(tmp_path, number) for number in (2, 3, 4, 7))
    flip(shard / "00000-0.arrow", 900)
    (index / names.INDEX).unlink()
    flip(manifest / names.MANIFEST, 30)
    os.truncate(cut / "00000-0.arrow", 50)
    lose_log(tmp_path)
    before = checkpoint_files(tmp_path)
    result = cli("adopt", tmp_path)
    assert result.exit_code == 1
    told = "".join(result.stdout.split())
    assert all(str(path) in told for path in (shard / "00000-0.arrow", index / names.INDEX, manifest / names.MANIFEST))
    assert numbers(tmp_path) == [1, 5, 6]
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-6"
    run(tmp_path, 8, max_to_keep=None)
    assert {path: content for path, content in files(tmp_path).items() if path in before} == before


def test_when_everything_is_damaged_no_log_is_written(tmp_path: Path) -> None:
    run(tmp_path, 1)
    flip(attempt_folder(tmp_path, 1) / "00000-0.arrow", 900)
    lose_log(tmp_path)
    result = cli("adopt", tmp_path)
    assert result.exit_code == 1
    assert "nothing was written" in result.stdout
    assert not (tmp_path / names.LOG).exists()


def test_of_two_attempts_at_a_number_the_newer_is_adopted_and_the_other_told(tmp_path: Path) -> None:
    run(tmp_path, 1, 5)
    older = attempt_folder(tmp_path, 5)
    shutil.copytree(older, tmp_path / "kept")
    run(tmp_path, 5, 6)
    newer = attempt_folder(tmp_path, 5)
    shutil.copytree(tmp_path / "kept", older)
    shutil.rmtree(tmp_path / "kept")
    lose_log(tmp_path)
    told = json.loads(cli("adopt", "--json", tmp_path).stdout)["checkpoints"]
    assert {one["attempt"]: one["fate"] for one in told if one["checkpoint"] == "ckpt-5"} == {
        older.name: "passed over",
        newer.name: "active",
    }
    assert numbers(tmp_path) == [1, 5, 6]
    assert attempt_folder(tmp_path, 5) == newer
    run(tmp_path, 7)
    assert list(older.iterdir()) != [], "never deleted"


def test_a_folder_under_another_name_is_told_what_it_was(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    (tmp_path / "ckpt-2").rename(tmp_path / "best-1")
    lose_log(tmp_path)
    result = cli("adopt", tmp_path)
    assert "saved as ckpt-2: rename the folder best-1 to that" in " ".join(result.stdout.split())
    assert numbers(tmp_path) == [1]


def test_a_folder_that_was_renamed_under_a_log_is_told_what_it_was(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, 3)
    (tmp_path / "ckpt-2").rename(tmp_path / "ckpt-9")
    shutil.copytree(tmp_path / "ckpt-3", tmp_path / "ckpt-10")
    before = entries(tmp_path)
    result = cli("adopt", "--force", tmp_path)
    told = " ".join(result.stdout.split())
    assert (result.exit_code, entries(tmp_path)) == (0, before)
    assert "passed over: it was saved as ckpt-2: rename the folder ckpt-9 to that" in told
    assert "passed over: it is a copy of ckpt-3, which is here too" in told
    (tmp_path / "ckpt-9").rename(tmp_path / "ckpt-2")
    assert fates(tmp_path, "--force") == {"ckpt-10": "passed over"}
    assert_loads(tmp_path / "ckpt-2", 2)


def test_nothing_to_adopt(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        result = cli("adopt", path)
        assert result.exit_code == 2
        assert "no checkpoint here to adopt" in result.stderr
        assert not (path / names.LOG).exists()
    run(tmp_path, 1)
    result = cli("adopt", "--force", tmp_path)
    assert (result.exit_code, len(entries(tmp_path))) == (0, 3)
    assert "nothing to adopt" in result.stdout


def test_two_that_adopt_at_once_write_one_entry(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lose_log(tmp_path)
    store = open_store(tmp_path)
    first, second = survey(store, check), survey(store, check)
    adopt(store, first, 1e9)
    with pytest.raises(CoordinatorError, match="somebody else has written to the log"):
        adopt(store, second, 1e9)
    assert len(entries(tmp_path)) == 1
    assert numbers(tmp_path) == [1, 2]


# ---- copies -------------------------------------------------------------------------------------------------------------


def test_a_copy_in_a_new_directory_is_adopted_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    run(tmp_path / "run", 4, 5)
    shutil.copytree(tmp_path / "run" / "ckpt-5", tmp_path / "new" / "ckpt-5")
    with pytest.raises(LogMissingError):
        Trainer(tmp_path / "new")
    assert fates(tmp_path / "new") == {"ckpt-5": "active"}
    with Trainer(tmp_path / "new") as trainer:
        assert trainer.manager.restore(f"{tmp_path}/new/ckpt-5") == f"{tmp_path}/new/ckpt-5"
        assert holds(trainer.checkpoint.state, 5)
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/new/ckpt-5"
        trainer.saved(6)
    assert numbers(tmp_path / "new") == [5, 6]
    assert numbers(tmp_path / "run") == [4, 5]


def test_copies_of_several_runs_are_ordered_by_their_times(tmp_path: Path) -> None:
    order = [("a", 9), ("b", 1), ("a", 3), ("b", 2)]
    for name, number in order:
        run(tmp_path / name, number)
    for name, number in order:
        shutil.copytree(tmp_path / name / f"ckpt-{number}", tmp_path / "new" / f"ckpt-{number}")
    assert cli("adopt", tmp_path / "new").exit_code == 0
    assert numbers(tmp_path / "new") == [9, 1, 3, 2]


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A run of its own with a copy from another run in it."""
    for number in (48, 49, 50):
        run(tmp_path / "other", number)
    run(tmp_path / "run", 1, 2)
    shutil.copytree(tmp_path / "other" / "ckpt-50", tmp_path / "run" / "ckpt-50")
    return tmp_path / "run"


def test_a_copy_beside_a_log_is_kept_for_good_and_the_newest_stays_the_newest(beside: Path) -> None:
    assert fates(beside, "--force") == {"ckpt-50": "preserved"}
    assert distckpt.latest_checkpoint(beside) == f"{beside}/ckpt-2"
    assert_loads(beside / "ckpt-50", 50)
    with Trainer(beside, max_to_keep=1) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{beside}/ckpt-2"
        assert trainer.manager.restore(50) == f"{beside}/ckpt-50"
        assert holds(trainer.checkpoint.state, 50)
        trainer.saved(3)
    assert on_disk(beside) == [3, 50]
    run(beside, 4, max_to_keep=1)
    assert on_disk(beside) == [4, 50]
    assert_sound_log(beside)


def test_a_log_that_may_be_in_use_is_not_touched_without_force(beside: Path) -> None:
    before = files(beside)
    result = cli("adopt", beside)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert fates(beside, "--dry-run") == {"ckpt-50": "preserved"}
    assert files(beside) == before
    age_log(beside)
    assert cli("adopt", beside).exit_code == 0


def age_log(directory: Path) -> None:
    """The log as an hour without news leaves it."""
    [*_, last] = entries(directory)
    path = directory / names.entry_path(last.seq)
    path.write_bytes(seal(msgspec.structs.replace(last, time=last.time - 3600)))


def test_a_job_that_runs_is_stopped_and_not_confused(beside: Path) -> None:
    with Trainer(beside) as trainer:
        trainer.saved(3)
        assert cli("adopt", "--force", beside).exit_code == 0
        assert isinstance(trainer.save(4).exception(60), FencedError | StaleRunError)
    assert numbers(beside) == [1, 2, 3]
    assert [record.number for record in state_of(beside).preserved] == [50]
    run(beside, 4)
    assert numbers(beside) == [1, 2, 3, 4]
    assert_sound_log(beside)


def test_a_number_that_the_log_has_is_told_and_left_alone(beside: Path) -> None:
    run(beside, 50)
    before = attempt_folder(beside, 50)
    assert fates(beside, "--force") == {"ckpt-50": "passed over"}
    assert attempt_folder(beside, 50) == before
    assert len(list((beside / "ckpt-50").iterdir())) == 2


def test_a_log_that_lists_nothing_is_as_good_as_none(tmp_path: Path) -> None:
    """As when an earlier release has claimed a directory whose log was lost."""
    run(tmp_path, 1, 2)
    lose_log(tmp_path)
    append_state(open_store(tmp_path), lambda state: state, kind="claim")
    assert fates(tmp_path, "--force") == {"ckpt-1": "active", "ckpt-2": "active"}
    assert numbers(tmp_path) == [1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_a_save_that_only_lacked_its_entry_becomes_what_it_would_have_been(beside: Path, again: bool) -> None:
    """As when the next manager takes it over, which it can not once adopting has claimed the directory."""
    with Trainer(beside, max_to_keep=None) as trainer:
        first = trainer.saved(3)
        if again:
            old = attempt_folder(beside, 3)
            shutil.copytree(old, beside / "kept")
        committed = entries(beside)[-1].seq
        trainer.saved(3 if again else 4)
    if again and not old.exists():
        shutil.copytree(beside / "kept", old)
    if again:
        shutil.rmtree(beside / "kept")
    for entry in entries(beside):
        if entry.seq > committed:  # as if it had died between manifest and commit
            (beside / names.entry_path(entry.seq)).unlink()
    assert numbers(beside) == [1, 2, 3]
    folder = "ckpt-3" if again else "ckpt-4"
    assert fates(beside, "--force") == {folder: "active", "ckpt-50": "preserved"}
    assert numbers(beside) == ([1, 2, 3] if again else [1, 2, 3, 4])
    assert distckpt.latest_checkpoint(beside) == f"{beside}/{folder}"
    if again:
        assert first == f"{beside}/ckpt-3"
        assert [record.number for record in state_of(beside).preserved] == [3, 50]
    run(beside, 6)
    assert_sound_log(beside)
