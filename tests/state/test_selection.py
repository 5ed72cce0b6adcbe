"""Restoring something else than what was saved: a part of it, under other names, from another run."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distckpt
from distckpt.errors import MismatchError
from tests.support.comparing import same


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def trained(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * seed)
    for _ in range(3):
        model(torch.rand(5, 4)).sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "progress": {"step": 3 * seed, "seen": {"a": seed}}}


@pytest.fixture
def other_run(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    objects = trained(1)
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), tmp_path / "other") as manager:
        path = manager.save(5).result(30)
    return path, objects


def alike(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_only_what_is_selected_is_restored(other_run: tuple[str, dict[str, Any]]) -> None:
    path, saved = other_run
    objects = trained(2)
    before = {id(value): value.clone() for state in objects["optimizer"].state.values() for value in state.values()}
    checkpoint = distckpt.Checkpoint(**objects)
    status = checkpoint.restore(path, select="model")
    status.assert_consumed()
    assert alike(objects["model"], saved["model"])
    assert objects["progress"] == {"step": 6, "seen": {"a": 2}}
    assert checkpoint.save_counter == 0
    values = [value for state in objects["optimizer"].state.values() for value in state.values()]
    assert all(torch.equal(value, before[id(value)]) for value in values)


def test_a_part_of_an_object_is_selected(other_run: tuple[str, dict[str, Any]]) -> None:
    path, saved = other_run
    objects = trained(2)
    kept = objects["model"][1].weight.clone()
    distckpt.Checkpoint(**objects).restore(path, select=["model.0", "progress.step"]).assert_consumed()
    assert alike(objects["model"][0], saved["model"][0])
    assert torch.equal(objects["model"][1].weight, kept)
    assert objects["progress"] == {"step": 3, "seen": {"a": 2}}


@pytest.mark.parametrize("rename", [{"model.0": "encoder.first"}, lambda key: key.replace("model.0", "encoder.first")])
def test_keys_are_renamed_and_prefixed(other_run: tuple[str, dict[str, Any]], rename: Any) -> None:
    path, saved = other_run
    encoder = nn.ModuleDict({"first": nn.Linear(4, 3)})
    checkpoint = distckpt.Checkpoint(encoder=encoder, model=network())
    checkpoint.restore(path, select=["model.0"], rename=rename).assert_consumed()
    assert alike(encoder["first"], saved["model"][0])


def test_a_part_of_an_object_becomes_an_object(tmp_path: Path) -> None:
    """Also where all of its new name was the end of the old one."""
    parts = nn.ModuleDict({"encoder": nn.Linear(4, 3), "scale": nn.ParameterDict({"all": torch.ones(2)})})
    tree = {"rates": {"low": {"first": 1, "second": torch.full((2,), 2.0)}}, "step": 5}
    path = distckpt.Checkpoint(model=parts, tree=tree).write(tmp_path)
    encoder, all_ = nn.Linear(4, 3), nn.ParameterDict({"all": torch.zeros(2)})
    checkpoint = distckpt.Checkpoint(encoder=encoder, scale=all_, low={"first": 0, "second": torch.zeros(2)}, step=0)
    rename = {"model.encoder": "encoder", "model.scale": "scale", "tree.rates.low": "low", "tree.step": "step"}
    checkpoint.restore(path, select=list(rename), rename=rename).assert_consumed()
    assert alike(encoder, parts["encoder"])
    assert torch.equal(all_["all"], torch.ones(2))
    assert (checkpoint.low["first"], checkpoint.low["second"].tolist(), checkpoint.step) == (1, [2.0, 2.0], 5)


@pytest.mark.parametrize(
    ("saved", "rename", "expected"),
    [
        ({"c": {"a": 1}}, {"c": "x.y.c"}, {"x": {"y": {"c": {"a": 1}}}}),
        ({"c": {"opt": {"a": 1, "b": 3}}}, {"c.opt": "c.new.deep"}, {"c": {"new": {"deep": {"a": 1, "b": 3}}}}),
        (
            {"d": {"p": {"q": {"w": 1}}, "r": {"s": {"v": 2}}}},
            {"d.p.q": "d.r.s"},
            {"d": {"r": {"s": {"v": 2, "w": 1}}}},
        ),
        ({"d": {1: {"a": 1}, 2: {"a": 2}}}, {"d.1": "d.2", "d.2": "d.1"}, {"d": {1: {"a": 2}, 2: {"a": 1}}}),
        ({"d": {"a": {".x": 1}}}, {"d.a": "d"}, {"d": {".x": 1}}),
        ({"w": {"enc.weight": 1, "b": 2}}, {"w.enc": "w.dec.inner"}, {"w": {"dec.inner.weight": 1, "b": 2}}),
        ({"w": {"a": {"b": 1}}}, {"w.a": "w.b"}, {"w": {"b": {"b": 1}}}),
        ({"w": {"a": {"a": 1, "b": 2}}}, {"w.a": "w"}, {"w": {"a": 1, "b": 2}}),
    ],
)
@pytest.mark.parametrize(
    "of", [float, lambda number: torch.full((2,), float(number)), lambda number: np.full(2, number)]
)
def test_what_is_renamed_has_the_structure_that_is_there(
    tmp_path: Path, saved: Any, rename: dict[str, str], expected: Any, of: Any
) -> None:
    check_rename(tmp_path, saved, rename, expected, of)


@pytest.mark.parametrize(
    ("saved", "rename", "expected"),
    [
        ({"o": OrderedDict(a=1, b=2)}, {"o.a": "o.z"}, {"o": OrderedDict(z=1, b=2)}),
        ({"o": OrderedDict(a=1, b=2)}, {"o.a": "o.z", "o.b": "o.y"}, {"o": OrderedDict(z=1, y=2)}),
        (
            {"w": {"o": OrderedDict(a=1, b={"c": 2})}},
            {"w.o.b": "w.o.d.e"},
            {"w": {"o": OrderedDict(a=1, d={"e": {"c": 2}})}},
        ),
        ({"w": {"o": OrderedDict(a=1, b=2)}}, {"w.o.a": "w.p"}, {"w": {"o": OrderedDict(b=2), "p": 1}}),
        ({"w": {"o": OrderedDict(a=1, b=2)}}, {"w.o": "w.q.o"}, {"w": {"q": {"o": OrderedDict(a=1, b=2)}}}),
    ],
)
@pytest.mark.parametrize("of", [lambda number: torch.full((2,), float(number)), lambda number: np.full(2, number)])
def test_what_is_renamed_within_a_container_stays_in_one_of_its_kind(
    tmp_path: Path, saved: Any, rename: dict[str, str], expected: Any, of: Any
) -> None:
    check_rename(tmp_path, saved, rename, expected, of)


def check_rename(directory: Path, saved: Any, rename: dict[str, str], expected: Any, of: Any) -> None:
    """What is saved is restored in the place of what is expected, of which every leaf is ``of`` a number."""
    path = distckpt.Checkpoint(**filled(saved, of)).write(directory)
    checkpoint = distckpt.Checkpoint(**filled(expected, lambda _: of(0)))
    checkpoint.restore(path, rename=rename).assert_consumed()
    found = {name: checkpoint.objects[name] for name in expected}
    assert same(filled(found, lambda value: value), filled(expected, of))


@pytest.mark.parametrize("of", [lambda number: torch.full((2,), float(number)), lambda number: np.full(2, number)])
def test_entries_of_a_list_are_renamed(tmp_path: Path, of: Any) -> None:
    path = distckpt.Checkpoint(parts=[{"a": of(1)}, {"a": of(2)}]).write(tmp_path)
    checkpoint = distckpt.Checkpoint(parts=[{"a": of(0)}, {"a": of(0)}])
    checkpoint.restore(path, rename={"parts.0": "parts.1", "parts.1": "parts.0"}).assert_consumed()
    assert same(checkpoint.parts, [{"a": of(2)}, {"a": of(1)}])


def filled(tree: Any, make: Any) -> Any:
    """The same dicts in order of their keys, of what is made of each number."""
    if isinstance(tree, OrderedDict):
        return OrderedDict((key, filled(item, make)) for key, item in tree.items())
    if isinstance(tree, dict):
        return {key: filled(tree[key], make) for key in sorted(tree)}
    return make(tree)


def test_a_dict_in_a_dict_is_told_from_a_name_with_a_dot(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(a={"encoder": {"w": torch.ones(3)}}).write(tmp_path)
    module = nn.ModuleDict({"encoder": nn.ParameterDict({"w": torch.zeros(3)})})
    with pytest.raises(MismatchError) as caught:
        distckpt.Checkpoint(a=module).restore(path)
    said = "told twice, as one side has a container in a container there, and the other a name with a dot: a.encoder.w"
    assert str(caught.value).endswith(f"; {said}")
    assert caught.value.missing == caught.value.unexpected == ("a.encoder.w",)


def test_an_optimizer_follows_a_renamed_module(other_run: tuple[str, dict[str, Any]]) -> None:
    path, saved = other_run
    net = nn.ModuleDict({"inner": network()})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.7)
    rename = {"model": "net.inner", **{f"optimizer.state.{at}": f"optimizer.state.inner.{at}" for at in (0, 1)}}
    distckpt.Checkpoint(net=net, optimizer=optimizer).restore(
        path, select=["model", "optimizer"], rename=rename
    ).assert_consumed()
    assert alike(net["inner"], saved["model"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(net.parameters(), saved["model"].parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], saved["optimizer"].state[theirs]["exp_avg"])


@pytest.mark.parametrize("name", ["scale", "exp_avg", "step"])
def test_an_optimizer_follows_a_parameter_that_is_called_like_what_it_keeps(tmp_path: Path, name: str) -> None:
    def adam(of: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(of.parameters())

    saved = nn.ModuleDict({"head": nn.ParameterDict({name: torch.ones(2)})})
    optimizer = adam(saved)
    saved["head"][name].grad = torch.ones(2)
    optimizer.step()
    path = distckpt.Checkpoint(model=saved, opt=optimizer).write(tmp_path)
    model = nn.ParameterDict({"head": torch.zeros(2)})
    restored = adam(model)
    rename = {f"model.head.{name}": "model.head", f"opt.state.head.{name}": "opt.state.head"}
    distckpt.Checkpoint(model=model, opt=restored).restore(path, rename=rename).assert_consumed()
    assert same(restored.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_key_that_is_renamed_to_nothing_is_left_out(other_run: tuple[str, dict[str, Any]]) -> None:
    path, _ = other_run
    checkpoint = distckpt.Checkpoint(model=network(), progress={"step": 0})
    status = checkpoint.restore(path, rename={"optimizer": None, "progress.seen": None})
    status.assert_consumed()
    assert checkpoint.progress == {"step": 3}


def test_a_new_run_begins_from_another_and_goes_on_by_itself(
    other_run: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    path, saved = other_run
    objects = trained(2)
    checkpoint = distckpt.Checkpoint(**objects)
    with distckpt.CheckpointManager(checkpoint, tmp_path / "new", init_fn=lambda: checkpoint.restore(path)) as manager:
        assert manager.restore_or_initialize() is None
        assert alike(objects["model"], saved["model"])
        assert objects["progress"] == saved["progress"]
        manager.save(9).result(30)
    assert distckpt.load(tmp_path / "new", "progress") == saved["progress"]


def test_a_manager_restores_a_selection(other_run: tuple[str, dict[str, Any]]) -> None:
    path, saved = other_run
    objects = trained(2)
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), Path(path).parent) as manager:
        manager.restore(5, select="model")
    assert alike(objects["model"], saved["model"])
    assert objects["progress"]["step"] == 6


def test_a_selector_of_nothing_names_what_it_could_have_meant(other_run: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(KeyError, match="did you mean 'model'"):
        distckpt.Checkpoint(**trained(2)).restore(other_run[0], select="modell")


def test_two_keys_cannot_be_renamed_to_one(other_run: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"of both 'model\.0\.weight' and 'model\.1\.weight'"):
        distckpt.Checkpoint(**trained(2)).restore(other_run[0], rename={"model.0": "model.x", "model.1": "model.x"})


def test_another_head_is_refused_with_both_lists_and_left_alone_if_that_is_meant(
    other_run: tuple[str, dict[str, Any]],
) -> None:
    path, saved = other_run
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 7), nn.Linear(7, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), Path(path).parent) as manager:
        with pytest.raises(MismatchError) as caught:
            manager.restore(5)
        assert set(caught.value.missing) == {"model.2.weight", "model.2.bias"}
        assert "optimizer.param_groups" in caught.value.unexpected
        assert set(caught.value.misshaped) == {"model.1.weight", "model.1.bias"}
        assert all(torch.equal(mine, kept) for mine, kept in zip(model.parameters(), before, strict=True))
        manager.restore(5, partial=True)
        status = manager.restore_status
    assert status is not None
    assert set(status.mismatched) == {"model.1.weight", "model.1.bias"}
    assert alike(model[0], saved["model"][0])
    assert torch.equal(model[1].weight, before[2])


def test_a_selection_that_leaves_holes_is_refused_before_anything_changes(tmp_path: Path) -> None:
    own = {"list": [torch.ones(1), torch.ones(2), torch.ones(3)]}
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=nn.Linear(2, 2), own=own), tmp_path) as manager:
        path = manager.save(1).result(30)
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(MismatchError, match=r"own .*selected.*'list' has 3 items, and only 1 of them"):
        distckpt.Checkpoint(model=model, own={"list": []}).restore(path, select=["model", "own.list.2"])
    assert torch.equal(model.weight, before)
