"""What changes between two saves without any tensor being replaced: the second save holds what is there then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import distckpt
from tests.support.comparing import same


def saved_twice(path: Path, change: Callable[[], object], **objects: Any) -> dict[str, Any]:
    """Saves, changes something and saves again; what the second save gives back."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), path) as manager:
        manager.save(1).result(30)
        change()
        second = manager.save(2).result(30)
    return distckpt.load(second)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, item in tree.items() for key, value in flat(item, f"{prefix}{name}.").items()}


def rename_a_part(model: Any) -> None:
    model._modules["c"] = model._modules.pop("b")


def tie_to_another(model: Any) -> None:
    model.b.weight = model.twin.weight


def stop_saving_a_buffer(model: Any) -> None:
    model.a.register_buffer("seen", model.a.seen, persistent=False)


def add_a_hook(model: Any) -> None:
    def double(part: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    model.a.register_state_dict_post_hook(double)


def put_a_method_there(model: Any) -> None:
    whole = model.state_dict
    model.state_dict = lambda *args, **kwargs: {
        name: value for name, value in whole(*args, **kwargs).items() if name.startswith("a.")
    }


def give_a_buffer_another_dtype(model: Any) -> None:
    model.a.seen.data = model.a.seen.data.view(torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        rename_a_part,
        tie_to_another,
        stop_saving_a_buffer,
        add_a_hook,
        put_a_method_there,
        give_a_buffer_another_dtype,
        lambda model: model.half(),
    ],
)
def test_what_is_done_to_a_module_between_two_saves_is_in_the_second(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model: Any = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a", "b", "twin")})
    model.a.register_buffer("seen", torch.ones(3))
    model.b.weight = model.a.weight
    found = saved_twice(tmp_path, lambda: change(model), model=model)["model"]
    assert same(flat(found), dict(model.state_dict()))


class OnlyTrained(nn.Linear):
    """Saves what is trained."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if getattr(self, name).requires_grad}


def test_a_state_dict_of_the_programs_own_is_asked_at_every_save(tmp_path: Path) -> None:
    model = OnlyTrained(2, 2)
    model.bias.requires_grad_(False)
    found = saved_twice(tmp_path, lambda: model.bias.requires_grad_(True), model=model)["model"]
    assert set(found) == {"weight", "bias"}


def rename_an_entry(optimizer: Any, entry: dict[str, Any]) -> None:
    entry["other"] = entry.pop("exp_avg_sq")


def add_a_flag(optimizer: Any, entry: dict[str, Any]) -> None:
    entry["flag"] = "x"


def add_a_list(optimizer: Any, entry: dict[str, Any]) -> None:
    entry["history"] = [torch.ones(2)]


def add_what_is_no_parameters(optimizer: Any, entry: dict[str, Any]) -> None:
    optimizer.state["all"] = {"norm": torch.ones(3)}


@pytest.mark.parametrize("change", [rename_an_entry, add_a_flag, add_a_list, add_what_is_no_parameters])
def test_what_is_done_to_an_optimizers_state_is_in_the_next_save(
    change: Callable[[Any, dict[str, Any]], None], tmp_path: Path
) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = saved_twice(
        tmp_path, lambda: change(optimizer, optimizer.state[model.weight]), model=model, optimizer=optimizer
    )
    wanted = {"weight" if isinstance(owner, torch.Tensor) else owner: dict(e) for owner, e in optimizer.state.items()}
    assert same(flat(found["optimizer"]["state"]), flat(wanted))


class Growing(optim.SGD):
    """Has more to save once there is more."""

    more: Any = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.more is None else {"more": self.more})


def test_a_part_of_an_optimizers_state_dict_may_come_and_go(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Growing(model.parameters(), lr=0.1)
    found = saved_twice(tmp_path / "comes", lambda: setattr(optimizer, "more", torch.ones(2)), optimizer=optimizer)
    assert found["optimizer"]["more"].tolist() == [1, 1]
    found = saved_twice(tmp_path / "goes", lambda: setattr(optimizer, "more", None), optimizer=optimizer)
    assert "more" not in found["optimizer"]


def test_a_hook_on_an_optimizers_state_dict_may_come_between_two_saves(tmp_path: Path) -> None:
    optimizer = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)

    def add(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "more": 7}

    found = saved_twice(tmp_path, lambda: optimizer.register_state_dict_post_hook(add), optimizer=optimizer)
    assert found["optimizer"]["more"] == 7


def test_a_tensor_of_a_tree_that_is_another_now_is_saved_as_that(tmp_path: Path) -> None:
    own = {"int": torch.ones(2), "conjugate": torch.ones(2, dtype=torch.complex64) * 1j}

    def change() -> None:
        own["int"].data = own["int"].data.view(torch.int32)
        own["conjugate"].data = own["conjugate"].data.conj()

    assert same(saved_twice(tmp_path, change, own=own)["own"], {k: v.resolve_conj() for k, v in own.items()})
