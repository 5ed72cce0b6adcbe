"""What a save leaves in the caller's hands: the path, as TensorFlow returns it, and how the save is getting on."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import SaveError
from distckpt.rank.pending import PendingSaves, progress_of


@pytest.fixture
def pending(tmp_path: Path) -> distckpt.PendingSave:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(1000)), tmp_path / "run") as manager:
        found = manager.save(7)
    assert found is not None
    return found


def test_it_is_the_path_that_tensorflow_returns(pending: distckpt.PendingSave, tmp_path: Path) -> None:
    path = f"{tmp_path}/run/ckpt-7"
    assert pending == path
    assert path == pending
    assert {path: 1}[pending] == 1
    assert pending in [path]
    assert pending in {path}
    assert sorted([pending, "a"]) == [path, "a"]
    assert isinstance(pending, str)
    assert type(str(pending)) is str
    assert type(pending.path) is str
    for text in (f"{pending}", "%s" % pending, "{}".format(pending), pending + ""):  # noqa: UP031, UP032
        assert text == path
    assert pending.split("-")[-1] == "7"
    assert pending.rsplit("/", 1)[1] == "ckpt-7"
    assert pending.endswith("ckpt-7")
    assert pending.startswith(str(tmp_path))
    assert "ckpt" in pending
    assert pending[-1] == "7"
    assert pending.replace("ckpt", "model").endswith("model-7")
    assert os.path.basename(pending) == "ckpt-7"
    assert os.path.join(pending, "x") == f"{path}/x"
    assert Path(pending) == Path(path)
    assert json.dumps({"saved": pending}) == json.dumps({"saved": path})


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_of_it_is_the_path_alone(pending: distckpt.PendingSave, through: Any) -> None:
    assert through(pending) == pending
    assert type(through(pending)) is str


def test_readers_and_managers_take_it(pending: distckpt.PendingSave) -> None:
    checkpoint = distckpt.Checkpoint(a=torch.zeros(1000))
    checkpoint.restore(pending).assert_consumed()
    assert checkpoint.a.all()
    assert distckpt.checkpoint_exists(pending)
    with distckpt.CheckpointManager(checkpoint, os.path.dirname(pending)) as manager:
        assert manager.restore(pending) == pending
        assert manager.latest_checkpoint == pending


def test_it_tells_what_the_save_has_cost(pending: distckpt.PendingSave) -> None:
    assert pending.nbytes is not None
    assert pending.nbytes > 4000
    assert pending.write_seconds is not None
    assert pending.total_seconds is not None
    assert 0 < pending.stall_seconds < pending.total_seconds
    assert 0 < pending.write_seconds < pending.total_seconds


def test_of_a_save_under_way_or_failed_it_tells_what_is_known(tmp_path: Path) -> None:
    pending = distckpt.PendingSave("run/ckpt-1", 1)
    assert (pending.nbytes, pending.write_seconds, pending.total_seconds) == (None, None, None)
    assert repr(pending) == "PendingSave('run/ckpt-1', under way)"
    checkpoint = distckpt.Checkpoint(a=torch.ones(3))
    manager = distckpt.CheckpointManager(checkpoint, tmp_path / "run")
    manager.save(1)
    manager.wait()
    (tmp_path / "run" / "ckpt-2").write_text("in the way")
    failed = manager.save(2)
    assert failed is not None
    with pytest.raises((SaveError, distckpt.errors.StorageError)):
        failed.result()
    assert failed.nbytes is None
    assert failed.total_seconds is not None
    assert failed.endswith("ckpt-2")
    manager.close()


def test_seconds_count_from_when_others_let_a_save_go() -> None:
    """Not from when it was begun to wait: it could have next to none then."""
    save, saves = distckpt.PendingSave("/run/ckpt-1", 1), PendingSaves()
    saves.add(save)
    told = iter([True, False])

    def held_up() -> bool:
        is_held_up = next(told)
        if not is_held_up:
            progress_of(save).fail(SaveError(1, "it goes on, and has come to its end"))
        return is_held_up

    assert saves.settle(0.01, lambda: False) == [save]
    assert saves.settle(0.01, held_up) == []
