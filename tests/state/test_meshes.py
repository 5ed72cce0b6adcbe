"""Models that FSDP2 shards over meshes, as people use them: not over all ranks, and in the midst of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gang import Gang

pytestmark = pytest.mark.timeout(120)


def test_two_meshes_that_hold_the_same_are_one_model(gang4: Gang, tmp_path: Path) -> None:
    for result in gang4.run("ranks.meshes:islands", directory=str(tmp_path), differ=False):
        assert result == {"error": "", "values": [[7.0]] * 8}


def test_two_meshes_that_hold_other_models_are_refused(gang4: Gang, tmp_path: Path) -> None:
    for result in gang4.run("ranks.meshes:islands", directory=str(tmp_path), differ=True):
        assert "model.0.weight (ranks 0, 2): rank 2 holds another value than rank 0" in result["error"]


@pytest.mark.parametrize("order", [["model", "optimizer"], ["optimizer", "model"]], ids="-".join)
@pytest.mark.parametrize("options", [{}, {"only_trainable": True}], ids=["all", "trainable"])
def test_a_model_that_is_whole_for_an_evaluation_is_saved_and_restored_in_its_shards(
    gang2: Gang, tmp_path: Path, order: list[str], options: dict[str, Any]
) -> None:
    for result in gang2.run("ranks.meshes:evaluated", directory=str(tmp_path), order=order, options=options):
        names = ("0.bias", "0.weight", "1.bias", "1.weight")
        assert sorted(result["keys"]) == [f"optimizer.state.{name}.exp_avg" for name in names]
        assert result["same"] == [True] * 4


def test_of_weights_that_are_one_here_the_later_counts_and_the_other_is_not_read(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.meshes:tied", directory=str(tmp_path)):
        assert result["same"]
        assert result["read"] < 1.5
