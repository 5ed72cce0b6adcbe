"""How many ranks are on a node, by what those say who have started them."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping

import pytest

from distckpt.storage import node
from distckpt.storage.node import met, ranks_here
from distckpt.storage.room import available, has_room


@pytest.fixture(autouse=True)
def _nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*node.TOLD, "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(node, "_met", 0)


@pytest.mark.parametrize(
    ("told", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "many"}, 1),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),5", "SLURM_NODEID": "3"}, 5),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),5", "SLURM_NODEID": "9"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x1000000000)", "SLURM_NODEID": "123456789"}, 4),
    ],
)
def test_the_launcher_says_how_many_ranks_share_a_node(
    told: Mapping[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert ranks_here() == ranks


def test_ray_train_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    context = types.SimpleNamespace(get_local_world_size=lambda: 6)
    monkeypatch.setitem(sys.modules, "ray.train", types.SimpleNamespace(get_context=lambda: context))
    assert ranks_here() == 6

    def outside() -> None:
        raise RuntimeError("not inside a training function")

    monkeypatch.setitem(sys.modules, "ray.train", types.SimpleNamespace(get_context=outside))
    assert ranks_here() == 1


def test_ranks_that_nobody_counted_have_counted_themselves_when_they_met() -> None:
    met(["a", "b", "a", "a"], "a")
    assert ranks_here() == 3
    assert not has_room(available() // 5)
