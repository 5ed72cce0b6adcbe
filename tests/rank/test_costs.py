"""What a manager measures of its own saves and restores, and what is left of that when it is no more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.directory.stats import KEEP_RUNS, PRUNE_EVERY, read_stats
from distckpt.errors import StorageError
from distckpt.format import names
from distckpt.format.json.stats import RunStats
from distckpt.rank import chronicle
from distckpt.storage import LocalStore
from distckpt.testing.faults import Fault, FaultOn
from distckpt.testing.faulty import FaultyStore
from tests.ranks.costs import train_until_killed
from tests.support.crashing import Crashing
from tests.support.damage import flip
from tests.support.gang import ROOT
from tests.support.small_runs import Trainer, mount, mounting, run, until


def told(directory: Path) -> tuple[RunStats, ...]:
    return read_stats(LocalStore(directory)).history.runs


def stats_files(directory: Path) -> list[Path]:
    return sorted((directory / names.STATS).iterdir())


# ---- in the process -----------------------------------------------------------------------------------------------


def test_a_manager_counts_its_saves_their_bytes_and_what_they_cost(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        manager = trainer.manager
        fresh = manager.stats()
        assert (fresh.saves, fresh.committed.times, fresh.restored.times) == (0, 0, 0)
        manager.restore_or_initialize()
        pending = [trainer.save(number) for number in (1, 2, 3)]
        manager.wait()
        stats = manager.stats()
        assert (stats.saves, stats.committed.times, stats.failed, stats.rollbacks) == (3, 3, 0, 0)
        assert (stats.first_stall.times, stats.stall.times, stats.between.times, stats.waited.times) == (1, 2, 2, 1)
        assert stats.bytes_committed == sum(each.nbytes or 0 for each in pending) == stats.bytes_written > 0
        assert stats.copied.total <= stats.first_stall.total + stats.stall.total <= stats.saving_seconds
        assert (
            stats.written.total
            <= stats.committed.total
            == pytest.approx(sum(each.total_seconds or 0.0 for each in pending))
        )
        assert stats.saving_seconds + stats.starting_seconds + stats.restored.total <= stats.seconds
        assert 0 <= stats.goodput <= 1
        trainer.manager.close()
        (run,) = told(tmp_path)
        assert [took.number for took in run.recent] == [1, 2, 3]
        assert [took.committed for took in run.recent] == [pytest.approx(each.total_seconds) for each in pending]
        assert [took.stall for took in run.recent] == [pytest.approx(each.stall_seconds) for each in pending]
        assert [took.at for took in run.recent] == sorted(took.at for took in run.recent)
        metrics = manager.stats().metrics("c/")
        assert (metrics["c/saves"], metrics["c/stall_times"]) == (3, 2)
        assert all(isinstance(value, int | float) for value in metrics.values())


def test_a_failed_save_is_counted_and_so_is_waiting_for_one(tmp_path: Path) -> None:
    with mounting():
        store = FaultyStore(LocalStore(tmp_path), FaultOn("put_unique", Fault.BEFORE, "ckpt-2"))
        with Trainer(mount(store), save_failures_allowed=1) as trainer:
            with pytest.raises(TimeoutError):
                trainer.save(1).result(0)
            trainer.manager.wait()
            assert isinstance(trainer.save(2).exception(), StorageError)
            trainer.saved(3)
            stats = trainer.manager.stats()
    assert (stats.saves, stats.committed.times, stats.failed) == (3, 2, 1)
    assert stats.waited.times >= 2


def test_a_restore_that_goes_back_loses_what_was_trained_since(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        manager = trainer.manager
        manager.restore_or_initialize()
        trainer.saved(1)
        at_risk = manager.stats().unsaved_seconds
        until(lambda: manager.stats().unsaved_seconds > at_risk + 0.05)
        lost = manager.stats().unsaved_seconds
        manager.restore()
        stats = manager.stats()
        assert stats.rollbacks == 1
        assert stats.bytes_restored > 0
        assert lost <= stats.lost_seconds <= stats.seconds
        assert stats.unsaved_seconds < lost


def test_hooks_hand_on_what_their_manager_measures(tmp_path: Path) -> None:
    progress = {"step": 0}
    checkpoint = distckpt.Checkpoint(a=torch.ones(3), progress=progress)
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=1)
    assert hook.stats() is None
    with distckpt.TrainingSession([hook], lambda: progress["step"], checkpoint=checkpoint) as session:
        for _ in range(2):
            session.run(lambda: progress.update(step=progress["step"] + 1))
        stats = hook.stats()
    assert stats is not None
    assert stats.saves == 3
    assert [one.end for one in told(tmp_path)] == ["closed"]


# ---- afterwards ---------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_has_told_what_is_lost_with_it(tmp_path: Path) -> None:
    child = Crashing(train_until_killed, directory=str(tmp_path))
    assert child.heard() == "begins"
    before_save = time.monotonic()
    assert child.heard() == "saved"
    after_save = time.monotonic()
    assert until(lambda: told(tmp_path) and told(tmp_path)[0].unsaved_seconds > 0.1)
    seen = told(tmp_path)[0]
    child.kill()
    child.end()
    killed = time.monotonic()
    [alone] = told(tmp_path)
    assert (alone.end, alone.saves, read_stats(LocalStore(tmp_path)).history.failures.count) == ("", 1, 0)

    with Trainer(tmp_path) as trainer:
        trainer.manager.restore_or_initialize()
    history = read_stats(LocalStore(tmp_path)).history
    crashed, closed = history.runs
    assert (history.failed(crashed), history.failed(closed), closed.end) == (True, False, "closed")
    assert (crashed.run, closed.run, history.silent, history.failures.count) == (1, 2, 0, 1)
    assert seen.unsaved_seconds <= history.lost(crashed) <= killed - before_save
    # What it had not told yet, it would have told soon; until then it counts as down.
    assert history.lost(crashed) + history.goodput.down >= killed - after_save - 0.1
    assert closed.bytes_restored > 0


def test_a_run_that_ends_by_an_exception_has_failed(tmp_path: Path) -> None:
    def train() -> None:
        with Trainer(tmp_path) as trainer:
            trainer.saved(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    history = read_stats(LocalStore(tmp_path)).history
    assert ([one.end for one in history.runs], history.failures.count) == (["failed"], 1)


def test_a_program_that_ends_by_an_error_and_closes_nothing_has_failed(tmp_path: Path) -> None:
    text = f"from tests.support.small_runs import Trainer\nTrainer({str(tmp_path)!r}).saved(1)\n1 / 0"
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, check=False)
    assert [one.end for one in told(tmp_path)] == ["failed"]


def test_saves_make_no_request_more_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object a run, replaced when the run ends; by the clock alone in between."""
    monkeypatch.setattr(chronicle, "FIRST_SECONDS", 1e6)
    made = []
    for saves in (2, 12):
        with mounting():
            store = FaultyStore(LocalStore(tmp_path / str(saves)))
            run(mount(store), *range(saves))
            made.append([call.operation for call in store.calls if call.path.startswith(f"{names.STATS}/")])
    assert made == [["replace"]] * 2


def test_a_store_that_does_not_take_it_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounting():
        run(mount(FaultyStore(LocalStore(tmp_path), FaultOn("replace", Fault.BEFORE, names.STATS))), 1)
    assert [each.getMessage() for each in caplog.records if "distckpt stats" in each.getMessage()]
    assert told(tmp_path) == ()


def test_a_checkpoint_that_is_saved_alone_leaves_none(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(a=torch.ones(3)).save(tmp_path / "alone")
    assert not (Path(path) / names.STATS).exists()


def test_what_is_damaged_newer_or_of_another_log_is_named_and_passed_over(tmp_path: Path) -> None:
    for number in range(4):
        run(tmp_path, number)
    damaged, newer, other, _ = stats_files(tmp_path)
    flip(damaged, 40)
    newer.write_bytes(newer.read_bytes().replace(b'"format":1', b'"format":7'))
    other.rename(other.with_name(other.name.replace("3-", "9-", 1)))
    (tmp_path / names.STATS / "notes.txt").write_text("mine")
    found = read_stats(LocalStore(tmp_path))
    assert [one.run for one in found.history.runs] == [4]
    assert len(found.passed_over) == 3
    for path, why in ((damaged, "CRC32C"), (newer, "format version 7"), (other.name.replace("3-", "9-", 1), "run 3")):
        assert [why in line for line in found.passed_over if Path(path).name in line] == [True]
    (tmp_path / names.LOG).rename(tmp_path / "lost")
    assert read_stats(LocalStore(tmp_path)).history.runs == ()


def test_their_number_is_bounded(tmp_path: Path) -> None:
    run(tmp_path, 1)
    [first] = stats_files(tmp_path)
    for number in range(KEEP_RUNS + PRUNE_EVERY):
        first.with_name(f"{500 + number:018d}-{number:032x}.json").write_bytes(b"{}")
    while len(stats_files(tmp_path)) > KEEP_RUNS:
        with Trainer(tmp_path):
            pass
    assert told(tmp_path)[-1].run == PRUNE_EVERY, "those of a log that was lost have higher numbers, and are older"
