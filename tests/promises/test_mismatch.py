"""What does not match is refused before anything is changed, on one rank as on many, and for all of them alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.errors import MismatchError
from tests.support.gang import Gang


@pytest.mark.timeout(120)
def test_two_ranks_refuse_what_one_of_them_cannot_take_and_change_nothing(gang2: Gang, tmp_path: Path) -> None:
    results = gang2.run("ranks.mismatch:refuse", directory=str(tmp_path), odd={"1": {"head": 5, "extra": True}})
    assert [result["same"] for result in results] == [True, True]
    assert results[0]["error"] == results[1]["error"]
    missing, unexpected, misfits = results[0]["lists"]
    assert results[0]["lists"] == results[1]["lists"]
    assert "model.2.weight" in missing
    assert "gone" in unexpected
    assert misfits["model.1.weight"] == "saved [2, 4], here [5, 4]"
    assert "ckpt-2: " in results[0]["error"]


@pytest.mark.timeout(120)
def test_keys_of_an_object_that_no_rank_has_a_place_for_are_refused_by_all(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.mismatch:refuse", directory=str(tmp_path), odd={}):
        assert result["same"]
        assert result["lists"] == [[], ["gone"], {}]


@pytest.mark.timeout(120)
def test_ranks_that_disagree_whether_to_restore_in_part_change_nothing(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.mismatch:refuse", directory=str(tmp_path), odd={}, partial={"1": True}):
        assert result["same"]
        assert result["error"].startswith("RestoreError")
        assert "partial" in result["error"]


@pytest.mark.timeout(120)
def test_a_partial_restore_fills_what_matches_and_says_on_all_ranks_what_does_not(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.mismatch:restore_in_part", directory=str(tmp_path)):
        assert result["path"] == f"{tmp_path}/ckpt-1"
        assert result["filled"]
        assert result["kept"]
        assert result["missing"] == ["model.2.bias", "model.2.weight"]
        assert sorted(result["mismatched"]) == ["model.1.bias", "model.1.weight"]
        assert result["unexpected"] == ["gone", "mine", "optimizer", "scheduler", "values"]


@pytest.mark.timeout(120)
def test_nothing_in_common_is_an_error_even_in_part(gang2: Gang, tmp_path: Path) -> None:
    for error in gang2.run("ranks.mismatch:nothing_in_common", directory=str(tmp_path)):
        assert "not in the checkpoint: b" in error
        assert "but in no object: a.x" in error


def test_one_rank_alone_refuses_before_anything_is_changed(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2), b=torch.ones(3)), tmp_path) as manager:
        manager.save(1)
    live = {"a": torch.zeros(2), "b": torch.zeros(4)}
    with pytest.raises(MismatchError, match=r"b \(saved \[3\], here \[4\]\)"):
        distckpt.Checkpoint(**live).restore(tmp_path)
    assert not live["a"].any()
    status = distckpt.Checkpoint(**live).restore(tmp_path, partial=True)
    assert status.mismatched == {"b": "saved [3], here [4]"}
    assert live["a"].all()
    assert not live["b"].any()
    with pytest.raises(MismatchError, match="not fitting"):
        status.assert_consumed()
    with pytest.raises(MismatchError, match="in no object"):
        distckpt.Checkpoint(c=torch.ones(2)).restore(tmp_path, partial=True)
