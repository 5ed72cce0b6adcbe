"""Memory and containers that two places hold: each gets what was saved for it, and what was alike stays one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.utils import parametrizations, weight_norm

import distckpt
from distckpt.errors import EncodeError, MismatchError
from tests.support.comparing import same


def saved(path: Path, **objects: Any) -> str:
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), path) as manager:
        return manager.save(1).result(30)


def restored(path: str, **objects: Any) -> distckpt.Checkpoint:
    checkpoint = distckpt.Checkpoint(**objects)
    checkpoint.restore(path).assert_consumed()
    return checkpoint


@pytest.mark.parametrize("order", [("model", "best"), ("best", "model")])
def test_a_models_weights_are_its_own_when_the_best_ones_begin_as_the_same_memory(
    order: tuple[str, str], tmp_path: Path
) -> None:
    model = nn.Linear(3, 2)
    best = {name: value + 1 for name, value in model.state_dict().items()}
    path = saved(tmp_path, model=model, best=best)
    fresh = nn.Linear(3, 2)
    objects = {"model": fresh, "best": dict(fresh.state_dict())}
    checkpoint = restored(path, **{name: objects[name] for name in order})
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(fresh.bias, model.bias)
    assert same(checkpoint.best, best)


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_one_array_in_two_places_stays_one_only_if_it_was_saved_alike(
    make: Callable[[int], Any], tmp_path: Path
) -> None:
    one = make(2)
    alike = restored(saved(tmp_path / "alike", own={"a": make(2), "b": make(2)}), own={"a": one, "b": one}).own
    assert alike["a"] is one
    assert alike["b"] is one
    apart = restored(saved(tmp_path / "apart", own={"a": make(2) + 1, "b": make(2)}), own={"a": one, "b": one}).own
    assert (apart["a"].tolist(), apart["b"].tolist()) == ([1, 1], [0, 0])
    assert type(apart["b"]) is type(one)


def test_a_view_stays_a_view(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    path = saved(tmp_path, own={"base": base, "last": base[3:]})
    fresh = torch.zeros(4)
    own = restored(path, own={"base": fresh, "last": fresh[3:]}).own
    own["base"][3] = 7
    assert own["last"].tolist() == [7]


@pytest.mark.parametrize(("one", "other"), [([1], [2]), ({"x": 1}, {"x": 2}), ({1}, {2}), ([0.0], [-0.0])])
def test_one_container_in_two_places_stays_one_only_if_it_was_saved_alike(one: Any, other: Any, tmp_path: Path) -> None:
    shared = type(one)()
    own = restored(saved(tmp_path / "apart", own={"a": one, "b": other}), own={"a": shared, "b": shared}).own
    assert same(own, {"a": one, "b": other})
    shared = type(one)()
    own = restored(saved(tmp_path / "alike", own={"a": one, "b": one}), own={"a": shared, "b": shared}).own
    assert own["a"] is own["b"] is shared


@pytest.mark.parametrize(("one", "other"), [([1], [2]), ({"x": 1}, {"x": 2}), ({"x": [1]}, {"x": [2]})])
def test_so_it_does_under_two_names_of_a_checkpoint(one: Any, other: Any, tmp_path: Path) -> None:
    shared = copy.deepcopy(other)
    apart = restored(saved(tmp_path / "apart", a=one, b=other), a=shared, b=shared)
    assert same([apart.a, apart.b], [one, other])
    shared = type(one)()
    alike = restored(saved(tmp_path / "alike", a=one, b=one), a=shared, b=shared)
    assert alike.a is alike.b is shared


def sgd(**entries: Callable[[torch.Tensor], torch.Tensor]) -> tuple[nn.Linear, optim.SGD]:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter].update({key: make(parameter) for key, make in entries.items()})
    return model, optimizer


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_state_in_the_memory_of_something_else_is_not_read_into_it(order: tuple[str, str], tmp_path: Path) -> None:
    model, optimizer = sgd(
        start=lambda p: p.detach() + 5,
        momentum=lambda p: p.detach() + 6,
        count=lambda p: torch.tensor(float(p.dim())),
        wide=lambda p: torch.full((4,), float(p.dim())),
    )
    path = saved(tmp_path, model=model, optimizer=optimizer)
    count, wide = torch.tensor(9.0), torch.tensor(9.0).expand(4)
    fresh, other = sgd(
        start=lambda p: p.detach(), momentum=lambda p: p.grad, count=lambda p: count, wide=lambda p: wide
    )
    gradients = [parameter.grad.clone() for parameter in fresh.parameters()]
    objects = {"model": fresh, "optimizer": other}
    restored(path, **{name: objects[name] for name in order})
    for mine, theirs, gradient in zip(fresh.parameters(), model.parameters(), gradients, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, gradient)
        assert same(other.state[mine], optimizer.state[theirs])


def test_a_buffer_whose_elements_share_memory_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("wide", torch.zeros(1).expand(4))
    with pytest.raises(RuntimeError, match="single memory location"):  # torch gives it, and cannot take it back
        model.load_state_dict(copy.deepcopy(model).state_dict())
    with pytest.raises(EncodeError, match=r"model\.wide.*share memory.*clone"):
        saved(tmp_path / "wide", model=model)
    model.wide = model.wide.clone(memory_format=torch.contiguous_format)
    restored(saved(tmp_path / "own", model=model), model=model)


def test_a_tensor_whose_memory_is_freed_is_refused_by_name(tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    path = saved(tmp_path, own={"t": tensor})
    tensor.untyped_storage().resize_(8)
    with pytest.raises(EncodeError, match=r"own\.t.*freed"):
        saved(tmp_path / "again", own={"t": tensor})
    with pytest.raises(MismatchError, match=r"own\.t.*freed"):
        distckpt.Checkpoint(own={"t": tensor}).restore(path)


def test_a_class_is_not_taken_for_an_object_of_it(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="model"):
        saved(tmp_path, model=nn.Linear)


def test_another_shape_below_a_hook_after_loading_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    def build(width: int) -> nn.ModuleDict:
        model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, width)})
        model.register_load_state_dict_post_hook(lambda module, keys: None)
        return model

    saved(tmp_path, model=build(2), own={"x": 1})
    model, own = build(3), {"x": 5}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model, own=own), tmp_path) as manager:
        with pytest.raises(MismatchError) as caught:
            manager.restore(1)
        assert set(caught.value.misshaped) == {"model.head.weight", "model.head.bias"}
        assert same(dict(model.state_dict()), before)
        assert own == {"x": 5}
        manager.restore(1, partial=True)
    assert own == {"x": 1}
    assert torch.equal(model["head"].weight, before["head.weight"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_older_weight_norm_is_taken_by_the_newer_as_torch_does(tmp_path: Path) -> None:
    older = weight_norm(nn.Linear(3, 2))
    newer = parametrizations.weight_norm(nn.Linear(3, 2))
    restored(saved(tmp_path, model=older), model=newer)
    by_torch = parametrizations.weight_norm(nn.Linear(3, 2))
    by_torch.load_state_dict(older.state_dict())
    assert torch.equal(newer.weight, by_torch.weight)
