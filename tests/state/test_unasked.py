"""Nothing that is not selected changes, whichever kind of object a part is selected of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import distckpt
from distckpt.errors import MismatchError
from tests.support.comparing import same


class Counting(nn.Module):
    """Has extra state, so that its ``load_state_dict`` is run."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.a, self.b, self.count = nn.Linear(4, 4), nn.Linear(4, 2), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def trained(lr: float, steps: int = 2) -> tuple[Counting, optim.Adam]:
    model = Counting(int(10 * lr))
    optimizer = optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        model(torch.rand(3, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def saved(path: Path, **objects: Any) -> str:
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), path) as manager:
        return manager.save(1).result(30)


def test_a_part_of_a_module_with_extra_state_is_restored_by_a_manager(tmp_path: Path) -> None:
    theirs, _ = trained(0.5)
    saved(tmp_path, model=theirs)
    model, _ = trained(0.1)
    kept = model.b.weight.clone()
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), tmp_path) as manager:
        manager.restore(1, select=["model.a", "model._extra_state"])
        assert manager.restore_status is not None
        manager.restore_status.assert_consumed()
    assert (model.count, torch.equal(model.a.weight, theirs.a.weight)) == (5, True)
    assert torch.equal(model.b.weight, kept)


@pytest.mark.parametrize(
    ("select", "steps"),
    [
        ("optimizer.state", 2),
        ("optimizer.state", 0),
        ("optimizer.param_groups", 2),
        ("optimizer.param_groups", 0),
        ("optimizer.state.a", 2),
        ("optimizer.state.a", 0),
        ("optimizer.state.a.weight.exp_avg", 2),
    ],
)
def test_a_part_of_an_optimizer_leaves_the_rest_of_it(select: str, steps: int, tmp_path: Path) -> None:
    their_model, theirs = trained(0.5)
    path = saved(tmp_path, model=their_model, optimizer=theirs)
    model, optimizer = trained(0.1, steps)
    before = {id(owner): dict(entry) for owner, entry in optimizer.state.items()}
    copies = {owner: {key: value.clone() for key, value in entry.items()} for owner, entry in before.items()}
    distckpt.Checkpoint(model=model, optimizer=optimizer).restore(path, select=select).assert_consumed()
    assert optimizer.param_groups[0]["lr"] == (0.5 if "groups" in select else 0.1)
    counterparts = dict(their_model.named_parameters())
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            is_chosen = f"optimizer.state.{name}.{key}.".startswith(f"{select}.")
            kept = copies.get(id(parameter), {}).get(key)
            wanted = theirs.state[counterparts[name]][key] if is_chosen else kept
            assert same(optimizer.state[parameter].get(key), wanted), (name, key)


@pytest.mark.parametrize(
    ("own", "select", "wanted"),
    [
        ({}, "own.a", {"a": {"x": 1, "y": 2}}),
        (None, "own.a.x", {"a": {"x": 1}}),
        ({"a": None, "b": 7}, "own.a.x", {"a": {"x": 1}, "b": 7}),
        ({"a": [torch.ones(1)], "b": 7}, "own.a.x", {"a": {"x": 1}, "b": 7}),
        ({"a": {"z": torch.ones(1)}, "c": 5}, "own.a.x", {"a": {"x": 1, "z": torch.ones(1)}, "c": 5}),
        ({"b": {"deep": 7}, "c": 5}, "own.b", {"b": 3, "c": 5}),
    ],
)
def test_a_part_of_a_tree_comes_into_whatever_is_there(own: Any, select: str, wanted: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, own={"a": {"x": 1, "y": 2}, "b": 3})
    checkpoint = distckpt.Checkpoint(own=own)
    checkpoint.restore(path, select=select).assert_consumed()
    assert sorted(checkpoint.own) == sorted(wanted)
    assert all(same(checkpoint.own[key], wanted[key]) for key in wanted)


class Whole:
    """Needs all of its state."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y

    def state_dict(self) -> dict[str, int]:
        return {"x": self.x, "y": self.y}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.x, self.y = state["x"], state["y"]


def test_an_object_with_a_state_dict_gets_the_rest_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, whole=Whole(1, 2))
    whole = Whole(8, 9)
    distckpt.Checkpoint(whole=whole).restore(path, select="whole.x").assert_consumed()
    assert (whole.x, whole.y) == (1, 9)


def test_what_an_object_in_a_per_rank_has_no_place_for_is_unexpected(tmp_path: Path) -> None:
    saved(tmp_path, model=distckpt.PerRank(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    smaller = distckpt.Checkpoint(model=distckpt.PerRank(nn.Sequential(nn.Linear(2, 2))))
    with distckpt.CheckpointManager(smaller, tmp_path) as manager, pytest.raises(MismatchError) as caught:
        manager.restore(1)
    assert set(caught.value.unexpected) == {"model@0.1.weight", "model@0.1.bias"}
