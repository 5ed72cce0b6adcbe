"""Checkpoints without a manager: one at a time, each in a directory of its own, as TensorFlow's Checkpoint saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import EncodeError
from tests.support.gang import Gang
from tests.support.small_runs import numbers


def holding(value: float) -> tuple[distckpt.Checkpoint, torch.Tensor]:
    tensor = torch.full((4,), value)
    return distckpt.Checkpoint(tensor=tensor, name="x"), tensor


def test_saves_are_counted_and_each_has_a_directory_of_its_own(tmp_path: Path) -> None:
    checkpoint, tensor = holding(1.0)
    first = checkpoint.save(tmp_path / "best")
    tensor.fill_(2.0)
    second = checkpoint.save(f"{tmp_path}/best")
    assert (first, second) == (f"{tmp_path}/best-1", f"{tmp_path}/best-2")
    assert checkpoint.save_counter == 2
    for path, value in ((first, 1.0), (second, 2.0)):
        assert distckpt.load(path, "tensor").eq(value).all()
        other, live = holding(0.0)
        other.restore(path).assert_consumed()
        assert live.eq(value).all()
        assert f"{path[:-1]}{other.save_counter}" == path
        with distckpt.open(path) as reader:
            assert reader.verify().good


def test_what_is_written_again_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    checkpoint, tensor = holding(1.0)
    checkpoint.save_counter = 7
    for value in (1.0, 2.0):
        tensor.fill_(value)
        assert checkpoint.write(tmp_path / "export") == f"{tmp_path}/export"
        other, live = holding(0.0)
        assert other.read(tmp_path / "export").assert_consumed().path.startswith(f"{tmp_path}/export/")
        assert live.eq(value).all()
        assert (checkpoint.save_counter, other.save_counter) == (7, 7)
    assert len(list((tmp_path / "export").glob("saved-0/*/manifest.json"))) == 1


def test_nothing_is_saved_where_a_run_saves(tmp_path: Path) -> None:
    checkpoint, _ = holding(1.0)
    with distckpt.CheckpointManager(checkpoint, tmp_path / "run") as manager:
        for number in (1, 2):
            manager.save(number)
    counter = checkpoint.save_counter
    with pytest.raises(ValueError, match="has checkpoints of a run"):
        checkpoint.write(tmp_path / "run")
    with pytest.raises(ValueError, match="inside of the directory of a run"):
        checkpoint.write(tmp_path / "run" / "ckpt-9")
    with pytest.raises(ValueError, match="inside of the directory of a run"):
        checkpoint.save(tmp_path / "run" / "ckpt")
    assert checkpoint.save_counter == counter
    assert numbers(tmp_path / "run") == [1, 2]


def test_what_cannot_be_stored_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(bad=object())
    with pytest.raises(EncodeError):
        checkpoint.write(tmp_path / "bad")
    assert checkpoint.save_counter == 0
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "bad")


@pytest.mark.timeout(120)
def test_all_ranks_save_one_together(gang2: Gang, tmp_path: Path) -> None:
    results: list[Any] = gang2.run("ranks.saves:save_once", prefix=f"{tmp_path}/once")
    assert results == [f"{tmp_path}/once-1"] * 2
    with distckpt.open(f"{tmp_path}/once-1") as reader:
        assert reader.manifest.world_size == 2
        assert reader.load("own") == [0, 1]
