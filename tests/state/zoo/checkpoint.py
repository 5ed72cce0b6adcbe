"""The Checkpoint itself: names, assignment, replacing, and objects given more than once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn, optim

import distckpt
from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.tensors import number
from tests.state.zoo.training import small, stepper

SECTION = "checkpoint"

add = partial(register, SECTION)

NAMES = (
    "values", "keys", "items", "type", "to", "train", "eval", "get", "update", "pop", "copy", "clear", "state_dict",
    "load_state_dict", "parameters", "forward", "step", "path", "name", "rank", "state", "param_groups", "dict", "class_",
    "model", "modules", "half", "data", "shape", "T", "number", "manifest", "self",
)  # fmt: skip


def _named(make: Any) -> Run:
    objects = {name: make(at) for at, name in enumerate(NAMES) if name != "self"}
    return Run(objects)


def _named_modules() -> Run:
    objects: dict[str, Any] = {
        name: nn.Linear(2, 2) for name in ("values", "keys", "items", "type", "to", "train", "half")
    }
    optimizer = optim.Adam([p for module in objects.values() for p in module.parameters()])

    def loss(at: int) -> Any:
        return sum((module.weight**2).sum() + module.bias.sum() for module in objects.values())

    return Run({**objects, "optimizer": optimizer}, stepper(objects["values"], optimizer, loss=loss))


def _nested_names() -> Run:
    return Run({"own": {name: {name: number()} for name in NAMES} | {"x.y": 1, "": 2, "$x": 3}})


def _assigned() -> Run:
    run = Run({"step": 0, "best": None, "own": {"a": number()}})

    def step(at: int) -> Any:
        run.checkpoint.step += 1
        run.checkpoint.best = {"at": at, "t": torch.full((2,), float(at))}
        return run.checkpoint.step

    run.step = step
    return run


def _replaced() -> Run:
    """Another model takes the place of the first midway; what is saved is the one that is there then."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    run = Run({"model": model, "optimizer": optimizer})

    def step(at: int) -> Any:
        if at == 1:
            torch.manual_seed(9)
            other = small()
            run.checkpoint.replace("model", other)
            run.checkpoint.replace("optimizer", optim.Adam(other.parameters(), lr=0.01))
        held = run.checkpoint.objects
        return stepper(held["model"], held["optimizer"])(at)

    run.step = step
    return run


def _twice() -> Run:
    model = small()
    shared = {"n": number(), "t": torch.rand(2)}
    return Run({"model": model, "again": model, "own": shared, "other": {"x": shared}})


def _per_rank(make: Any) -> Run:
    return Run({"own": distckpt.PerRank(make()), "other": number()})


def _random_state() -> Run:
    """The saved numbers go on; that a restore leaves them alone does not hold for who asks for them."""
    state = distckpt.RandomState()
    return Run({"rng": state, "other": number()})


add("names", "objects of any name: values, keys, type, to, train ...", lambda: _named(lambda at: number()), steps=0)
add(
    "names-tensors",
    "objects of any name: values, keys, type, to, train ...",
    lambda: _named(lambda at: torch.rand(2)),
    steps=0,
)
add("names-modules", "objects of any name: values, keys, type, to, train ...", _named_modules, two_ranks=True)
add("names-inside", "keys of any text", _nested_names, steps=0)
add(
    "names-collide-int",
    "two places with one key, such as `a.b` and `a` with `b`",
    lambda: Run({"own": {1: number(), "1": 2}}),
    steps=0,
    refused=Refusal("own.1", r"(?i)rename"),
)
add(
    "names-collide",
    "two places with one key, such as `a.b` and `a` with `b`",
    lambda: Run({"own": {"a.b": 1, "a": {"b": number()}}}),
    steps=0,
    refused=Refusal("own.a.b", r"(?i)rename"),
)
add(
    "assigned",
    "values and trees that are assigned: `checkpoint.step += 1`",
    _assigned,
    torch_can=False,
    two_ranks=True,
)
add("replaced", "objects that are replaced", _replaced)
add("twice", "one object under two names", _twice, steps=0)
add("per-rank-module", "`PerRank` around modules", lambda: _per_rank(small), steps=0, two_ranks=True)
add(
    "per-rank-tensor",
    "`PerRank` around tensors and trees",
    lambda: _per_rank(lambda: torch.rand(3)),
    steps=0,
    two_ranks=True,
)
add(
    "per-rank-tree",
    "`PerRank` around tensors and trees",
    lambda: _per_rank(lambda: {"a": number(), "b": [torch.rand(2)], "best": None}),
    steps=0,
    two_ranks=True,
)
add("per-rank-value", "`PerRank` around tensors and trees", lambda: _per_rank(number), steps=0, two_ranks=True)
add(
    "per-rank-inside",
    "`PerRank` inside a tree",
    lambda: Run({"own": {"cursor": distckpt.PerRank(3)}}),
    steps=0,
    refused=Refusal("own.cursor", r"Checkpoint|name of its own"),
)
add(
    "module-inside",
    "a module or an optimizer inside a tree",
    lambda: Run({"own": {"models": [small()]}}),
    steps=0,
    refused=Refusal("own.models"),
)
