"""Something else is put in a place, or what is there changes, after the first save: the next save holds what is there."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import distckpt
from tests.support.comparing import same


def saved_twice(path: Path, change: Callable[[distckpt.Checkpoint], object], **objects: Any) -> dict[str, Any]:
    """Saves, changes something and saves again; what the second save gives back."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), path) as manager:
        manager.save(1).result(30)
        change(manager.checkpoint)
        second = manager.save(2).result(30)
    return distckpt.load(second)


def plain(value: Any) -> Any:
    """As tensors and dicts, which can be compared."""
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


PAIRS: list[tuple[Any, Any]] = [
    (1, 2),
    (torch.ones(2), torch.zeros(2)),
    (torch.ones(2), torch.zeros(3)),
    (torch.ones(2), "x"),
    ("x", torch.ones(2)),
    ({"a": 1}, [1]),
    ({"a": torch.ones(1)}, {"a": torch.zeros(1)}),
    (np.ones(2), np.zeros(2)),
    (nn.Linear(2, 2), nn.Linear(2, 2)),
    (nn.Linear(2, 2), nn.Linear(3, 3)),
    (nn.Linear(2, 2), {"weight": torch.ones(2, 2)}),
    (5, nn.Linear(2, 2)),
    (None, torch.ones(1)),
]


@pytest.mark.parametrize("wrapped", ["", "the object inside", "the wrapper"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda value: type(value).__name__)
def test_another_object_is_saved_in_place_of_the_first(first: Any, second: Any, wrapped: str, tmp_path: Path) -> None:
    def change(checkpoint: distckpt.Checkpoint) -> None:
        if wrapped == "the object inside":
            checkpoint.thing.obj = second
        else:
            checkpoint.thing = distckpt.PerRank(second) if wrapped else second

    own = copy.deepcopy(first)
    found = saved_twice(tmp_path, change, thing=distckpt.PerRank(own) if wrapped else own)["thing"]
    assert same(plain(found[0] if wrapped else found), plain(second))


def test_what_a_restore_has_put_in_place_is_saved_next_and_what_is_put_in_its_place_then(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(number=1, tensor=torch.ones(2), tree={"x": [1]})
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1)
        checkpoint.number, checkpoint.tensor, checkpoint.tree = 2, torch.zeros(2), {"x": [2], "y": 1}
        manager.save(2).result(30)
        manager.restore(1)
        third = manager.save(3).result(30)
        checkpoint.number = 5
        checkpoint.tree["x"].append(9)
        fourth = manager.save(4).result(30)
    assert distckpt.load(third, "number") == 1
    assert distckpt.load(third, "tensor").tolist() == [1, 1]
    assert distckpt.load(third, "tree") == {"x": [1]}
    assert distckpt.load(fourth, "number") == 5
    assert distckpt.load(fourth, "tree") == {"x": [1, 9]}


def test_what_changes_inside_of_a_tree_is_saved_as_it_is_then(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "array": np.arange(4.0),
        "view": np.arange(8.0)[::2],
        "list": [1, [2, 3]],
        "tuple": (torch.ones(2), [1]),
        "nested": {"x": {"y": [torch.zeros(2)]}},
        "generator": torch.Generator(),
    }

    def change(_: distckpt.Checkpoint) -> None:
        tree["array"][1] = 7
        tree["view"][1] = 9
        tree["list"][1].append(4)
        tree["tuple"][0].add_(1)
        tree["tuple"][1].append(2)
        tree["nested"]["x"]["y"][0] = torch.full((2,), 5.0)
        torch.rand(3, generator=tree["generator"])

    found = saved_twice(tmp_path, change, tree=tree)["tree"]
    assert torch.equal(found.pop("generator").get_state(), tree.pop("generator").get_state())
    assert repr(found) == repr(tree)


def negated() -> tuple[torch.Tensor, torch.Tensor]:
    """A real tensor, and one at the same place that torch has marked as its negative."""
    number = torch.tensor([1 + 2j, 3 - 4j])
    return number.imag, number.conj().imag


def test_a_tensor_that_is_marked_as_negated_is_saved_as_what_it_stands_for(tmp_path: Path) -> None:
    first, second = negated()
    found = saved_twice(tmp_path / "tree", lambda _: setattr(first, "data", second), own=[first])
    assert found["own"][0].tolist() == [-2, 4]
    first, second = negated()
    module = nn.Module()
    module.register_buffer("part", first)
    found = saved_twice(tmp_path / "module", lambda _: setattr(first, "data", second), module=module)
    assert found["module"]["part"].tolist() == [-2, 4]
    found = saved_twice(tmp_path / "again", lambda _: None, module=module)
    assert found["module"]["part"].tolist() == [-2, 4]


class Giving:
    """Has a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"first": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("wrap", [lambda obj: obj, distckpt.PerRank])
def test_a_state_dict_that_an_object_is_given_later_is_asked(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    own: Any = Giving()
    found = saved_twice(tmp_path, lambda _: setattr(own, "state_dict", lambda: {"second": 2}), own=wrap(own))["own"]
    assert found in ({"second": 2}, [{"second": 2}])


class Doubling(nn.Linear):
    """Saves twice its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach() * 2


class WithMore(nn.Linear):
    """Has more to save than its tensors."""

    def get_extra_state(self) -> Any:
        return {"x": 1}

    def set_extra_state(self, state: Any) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize(
    "change",
    [
        lambda part: setattr(part, "_save_to_state_dict", MethodType(Doubling._save_to_state_dict, part)),
        lambda part: setattr(part, "__class__", Doubling),
        lambda part: setattr(part, "__class__", WithMore),
        lambda part: setattr(part, "bias", None),
        lambda part: setattr(part.weight, "data", torch.full((2, 2), 3.0)),
    ],
)
def test_what_a_part_of_a_module_saves_may_change(change: Callable[[Any], object], tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    found = saved_twice(tmp_path, lambda _: change(model["a"]), model=model)["model"]
    assert same(found, dict(model.state_dict()))


def trained(model: nn.Module) -> optim.Adam:
    """An optimizer of its parameters that has made a step."""
    optimizer = optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def test_items_of_containers_in_an_optimizers_state_come_and_go(tmp_path: Path) -> None:
    """Also where they are views of its other tensors, whose memory is known."""
    model = nn.Linear(2, 2, bias=False)
    optimizer = trained(model)
    entry = optimizer.state[model.weight]
    moment = entry["exp_avg"]
    entry |= {"step": torch.tensor(1.0), "list": [moment[0]], "dict": {"x": moment[0]}}

    def change(_: distckpt.Checkpoint) -> None:
        entry["list"].append(moment[1])
        entry["dict"] |= {"x": moment[1], "y": moment[0]}

    found = saved_twice(tmp_path, change, model=model, optimizer=optimizer)["optimizer"]["state"]["weight"]
    assert same(found["list"], [moment[0], moment[1]])
    assert same(found["dict"], {"x": moment[1], "y": moment[0]})


def test_an_optimizers_groups_and_state_may_be_others(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer: Any = optim.SGD([{"params": part.parameters()} for part in model], lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    first, second = optimizer.param_groups

    def change(_: distckpt.Checkpoint) -> None:
        first["lr"], second["more"] = 5.0, [1]
        first["params"].append(second["params"].pop())
        optimizer.state = defaultdict(dict, {model[0].weight: {"momentum_buffer": torch.full((2, 2), 9.0)}})

    found = saved_twice(tmp_path, change, model=model, optimizer=optimizer)["optimizer"]
    assert (found["param_groups"][0]["lr"], found["param_groups"][1]["more"]) == (5.0, [1])
    assert same(found["state"], {"0.weight": {"momentum_buffer": torch.full((2, 2), 9.0)}})


class Hiding(nn.ModuleDict):
    """Says nothing of what it has."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return next(iter(self.values()))(value)


def test_an_optimizers_state_goes_by_the_names_that_parameters_have_then(tmp_path: Path) -> None:
    model = Hiding({"a": nn.Linear(2, 2, bias=False)})
    optimizer = trained(model)

    def rename(_: distckpt.Checkpoint) -> None:
        model._modules["b"] = model._modules.pop("a")

    found = saved_twice(tmp_path, rename, model=model, optimizer=optimizer)
    assert list(found["optimizer"]["state"]) == ["b.weight"]
