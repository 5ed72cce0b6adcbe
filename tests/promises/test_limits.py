"""What a reader would refuse is refused before it is written; training goes on, and so does the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.errors import CoordinatorError, UnreadableError
from distckpt.format.json.export import ExportManifest
from distckpt.format.json.log import Entry
from distckpt.format.json.manifest import Manifest
from tests.support.small_runs import Trainer, assert_sound_log, entries, holds, leftovers, numbers, run, settled


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A log entry has room for some twenty checkpoints."""
    monkeypatch.setattr(Entry, "MAX_BYTES", 6000)
    return 6000


def save_until_refused(trainer: Trainer) -> int:
    """Save 1, 2, 3 ...; the last number that was acknowledged."""
    for number in range(1, 100):
        error = trainer.save(number).exception(60)
        if error is not None:
            assert isinstance(error, UnreadableError)
            assert f"checkpoint {number} was not saved" in str(error)
            assert "Keep fewer: give the manager a (lower) max_to_keep" in str(error)
            return number - 1
    raise AssertionError("an entry of any length was written")


@pytest.mark.usefixtures("small")
def test_a_log_entry_that_no_reader_would_take_is_never_acknowledged(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=None) as trainer:
        last = save_until_refused(trainer)
        for number in (200, 201):  # training goes on, and nothing hangs
            with pytest.raises(UnreadableError):
                trainer.saved(number)
    assert 10 < last < 99
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-{last}"
    assert numbers(tmp_path) == list(range(1, last + 1))
    settled(tmp_path)
    assert leftovers(tmp_path) == set()
    assert_sound_log(tmp_path)


@pytest.mark.usefixtures("small")
def test_who_keeps_fewer_from_then_on_can_save_again(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=None) as trainer:
        last = save_until_refused(trainer)
    for _ in range(3):  # every start claims and begins a run
        with Trainer(tmp_path, max_to_keep=None) as trainer, pytest.raises(UnreadableError):
            trainer.saved(200)
    assert numbers(tmp_path) == list(range(1, last + 1))
    run(tmp_path, 300, 301, max_to_keep=3)
    assert numbers(tmp_path) == [last, 300, 301]
    assert holds(distckpt.load(tmp_path / "ckpt-301")["state"], 301)


def test_a_manifest_that_no_reader_would_take_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        monkeypatch.setattr(Manifest, "MAX_BYTES", 200)
        with pytest.raises(UnreadableError, match=r"Manifest cannot be stored.*from fewer ranks"):
            trainer.saved(2)
        assert not list(tmp_path.glob("ckpt-2/*/index.arrow"))
        monkeypatch.undo()
        trainer.saved(3)
    assert numbers(tmp_path) == [1, 3]


def test_an_index_that_no_reader_would_take_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        monkeypatch.setattr("distckpt.format.arrow.index.MAX_INDEX_BYTES", 1000)
        with pytest.raises(UnreadableError, match=r"an index of .* Save fewer tensors or values"):
            trainer.saved(2)
        monkeypatch.undo()
        trainer.saved(3)
    assert numbers(tmp_path) == [1, 3]


@pytest.mark.parametrize("run_id", ["", "x" * 201, "x" * (1 << 20)])
def test_a_name_of_a_run_that_the_log_has_no_room_for_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match="run_id must be a text of 1 to 200 characters"):
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, run_id=run_id)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_run_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="the run cannot begin"):
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, run_id="half a pair: \ud800")
    assert [entry.kind for entry in entries(tmp_path)] == ["claim"]


def test_an_export_that_no_reader_would_take_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.export.recipes import recipes_of
    from distckpt.export.task import Order, carry_out

    model = torch.nn.Linear(2, 2)
    checkpoint = distckpt.Checkpoint(model=model)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1)
    record = entries(tmp_path)[-1].state.active[0]
    monkeypatch.setattr(ExportManifest, "MAX_BYTES", 100)
    recipes = recipes_of(checkpoint, {"it": distckpt.Export(key="model")})
    outcome = carry_out(Order(str(tmp_path), None, record, recipes))
    assert outcome.kind == "failed"
    assert "cannot be stored" in outcome.text
    assert not list(tmp_path.glob("ckpt-1/*/export*"))
