"""What a refused checkpoint has touched: all of it is filled by the one that is restored, or has not been touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import DamagedError, NoGoodCheckpointError
from tests.support.damage import flip, payload_of
from tests.support.gang import Gang


def save(directory: Path, number: int, **objects: Any) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), directory) as manager:
        manager.save(number)


def two(directory: Path) -> None:
    """ckpt-1 has a alone; ckpt-2 has a and b, whose last byte is not what was written."""
    save(directory, 1, a=torch.full((1000,), 1.0))
    save(directory, 2, a=torch.full((1000,), 2.0), b=torch.full((100_000,), 2.0))
    file, end = payload_of(directory / "ckpt-2", "b")
    flip(file, end - 1)


def test_what_the_older_checkpoint_lacks_keeps_what_it_held_when_part_of_one_is_restored(tmp_path: Path) -> None:
    two(tmp_path)
    live = {"a": torch.full((1000,), -1.0), "b": torch.full((100_000,), -1.0)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(**live), tmp_path) as manager:
        assert manager.restore(partial=True) == f"{tmp_path}/ckpt-1"
        assert manager.restore_status is not None
        assert manager.restore_status.missing == ("b",)
    assert live["a"].eq(1).all()
    assert live["b"].eq(-1).all()


def test_a_partial_restore_that_finds_damage_has_changed_nothing(tmp_path: Path) -> None:
    two(tmp_path)
    live = {"a": torch.full((1000,), -1.0), "b": torch.full((100_000,), -1.0)}
    with pytest.raises(DamagedError):
        distckpt.Checkpoint(**live).restore(tmp_path / "ckpt-2", partial=True)
    assert live["a"].eq(-1).all()
    assert live["b"].eq(-1).all()


def test_when_no_checkpoint_is_good_it_is_told_whether_tensors_hold_parts_of_a_bad_one(tmp_path: Path) -> None:
    two(tmp_path)
    live = {"a": torch.full((1000,), -1.0), "b": torch.full((100_000,), -1.0)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(**live), tmp_path) as manager:
        with pytest.raises(NoGoodCheckpointError, match=r"ckpt-2: .*CRC.*ckpt-1: MismatchError.*not in.*: b") as caught:
            manager.restore()
        assert caught.value.spoiled
        with pytest.raises(NoGoodCheckpointError) as caught:
            manager.restore(2, partial=True)
        assert not caught.value.spoiled


def test_a_rank_that_drops_its_state_on_a_resize_has_it_as_it_was(gang2: Gang, tmp_path: Path) -> None:
    gang2.run("ranks.fall_back:save", directory=str(tmp_path), number=1, only=["own", "weights"])
    own = {"cursor": torch.full((4,), 2.0), "seen": [2]}
    save(tmp_path, 2, own=distckpt.PerRank(own), weights=torch.full((1000,), 2.0))
    file, end = payload_of(tmp_path / "ckpt-2", "weights")
    flip(file, end - 1)
    mine: dict[str, Any] = {"cursor": torch.full((4,), -1.0), "seen": [-1]}
    weights = torch.full((1000,), -1.0)
    checkpoint = distckpt.Checkpoint(own=distckpt.PerRank(mine, on_resize="drop"), weights=weights)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        assert manager.restore() == f"{tmp_path}/ckpt-1"
    assert weights.eq(1).all()
    assert mine["cursor"].eq(-1).all()
    assert mine["seen"] == [-1]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("partial", [False, True])
def test_a_rank_that_has_read_all_of_a_checkpoint_which_another_refuses_has_kept_nothing_of_it(
    gang2: Gang, tmp_path: Path, partial: bool
) -> None:
    for number in (1, 2):
        gang2.run("ranks.fall_back:save", directory=str(tmp_path), number=number)
    file, end = payload_of(tmp_path / "ckpt-2", "own@1.cursor")
    flip(file, end - 1)
    for found in gang2.run("ranks.fall_back:restore", directory=str(tmp_path), partial=partial):
        assert found["path"] == f"{tmp_path}/ckpt-1"
        assert found["weights"] == [1.0]
        assert found["tree"] == {"seen": 1}
        assert found["loaded"] == [1]
        assert found["cursor"] == [1.0]
