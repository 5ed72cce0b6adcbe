"""torch.distributed.checkpoint with our Writer and Reader on several ranks, which no Ray connects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.directory.garbage import attempt_folders
from distckpt.directory.log import read_tail
from distckpt.storage import open_store
from tests.ranks import dcp as ranks
from tests.support.gang import Gang, RankError

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(4) as gang:
        yield gang


def committed(directory: Path) -> list[int]:
    return [record.number for record in read_tail(open_store(directory)).state.active]


def test_sharded_models_and_optimizers_come_back_on_any_number_of_ranks(gang: Gang, tmp_path: Path) -> None:
    saves = [(1, 2, "async"), (2, 3, "save"), (3, 4, "tp"), (4, 1, "save")]
    for number, size, how in saves:
        saved = gang.run("ranks.dcp:train_and_save", directory=str(tmp_path), number=number, size=size, how=how)[0]
        path = str(tmp_path / f"ckpt-{number}")
        for other, with_what in ((3, "dcp"), (1, "dcp"), (4, "tp"), (2, "ours")):
            found = gang.run("ranks.dcp:load_and_digest", path=path, size=other, how=with_what)
            assert found == [saved] * other + [None] * (4 - other), (number, other, with_what)
        with distckpt.open(path) as reader:
            assert reader.verify().good
            assert reader.manifest.world_size == size
    assert committed(tmp_path) == [1, 2, 3, 4]


def test_what_a_checkpoint_of_ours_has_saved_is_loaded_by_dcp_on_several_ranks(gang: Gang, tmp_path: Path) -> None:
    there = ranks.Trained(3, 1)
    distckpt.Checkpoint(model=there.model, optimizer=there.optimizer, progress={"step": 1}).write(tmp_path)
    found = gang.run("ranks.dcp:load_and_digest", path=str(tmp_path), size=3)
    assert found == [there.digest()] * 3 + [None]


LAYOUTS = ["rows", "columns", "hybrid", "strided", "alone", "rows"]


def test_tensors_are_cut_anew_from_any_layout_to_any_other(gang: Gang, tmp_path: Path) -> None:
    for before, after in itertools.pairwise(LAYOUTS):
        found = gang.run("ranks.dcp:reshard", directory=str(tmp_path / before), before=before, after=after)
        assert found == [{}] * 4, (before, after)


def test_the_sharded_tensors_of_before_are_cut_anew_and_loaded_as_plain_ones(gang: Gang, tmp_path: Path) -> None:
    assert gang.run("ranks.dcp:reshard_sharded_tensors", directory=str(tmp_path)) == [[]] * 4


STEPS = [("set_up_storage_writer", 2), ("prepare_local_plan", 0), ("prepare_global_plan", 0), ("write_data", 3),
         ("write_data", 0), ("finish", 0)]  # fmt: skip


def test_a_rank_that_fails_fails_the_save_on_all_and_nothing_is_committed(gang: Gang, tmp_path: Path) -> None:
    for told in gang.run("ranks.dcp:fail_at", directory=str(tmp_path), steps=STEPS):
        assert told == [{str(rank): f"{step} on rank {rank}"} for step, rank in STEPS]
    assert committed(tmp_path) == [1]
    assert torch.equal(distckpt.load(tmp_path)["w"], torch.ones(4))


def test_ranks_that_save_or_read_different_checkpoints_are_told_so(gang: Gang, tmp_path: Path) -> None:
    for number in (1, 2):
        gang.run("ranks.dcp:train_and_save", directory=str(tmp_path / "other"), number=number, size=4)
    for saving, loading in gang.run("ranks.dcp:disagree", directory=str(tmp_path / "other")):
        assert "rank 3" in saving
        assert "saves 3" in saving
        assert "do not read the same checkpoint" in loading
    assert committed(tmp_path / "other") == [1, 2]


def test_a_rank_that_is_killed_while_it_writes_leaves_garbage_only(tmp_path: Path) -> None:
    with Gang(2) as gang:
        gang.start("ranks.dcp:die_in_write_data", directory=str(tmp_path))
        assert gang.result(0) != ""
        with pytest.raises(RankError):
            gang.result(1)
    assert committed(tmp_path) == []
    [left] = attempt_folders(open_store(tmp_path))
    assert left.startswith("ckpt-1/e1-")
