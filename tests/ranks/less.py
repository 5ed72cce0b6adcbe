"""Rank functions that leave out part of what they hold: FSDP2 with a frozen part, an average, and state of each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt
from distckpt.errors import DistckptError

NUMBERS = {"trained": 1.0, "other": 7.0}
OPTIONS: dict[str, Any] = {"save_timeout": 30.0}


class Held:
    """A sharded model of which the first layer is frozen, an optimizer that has had all of it, and a loader of this rank."""

    def __init__(self, number: float) -> None:
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in self.model:
            fully_shard(part, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(number)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, number)
        self.optimizer.step()
        self.model[0].requires_grad_(False)
        self.loader = {"cursor": number, "cache": torch.full((3,), number + dist.get_rank())}

    def checkpoint(self, **options: Any) -> distckpt.Checkpoint:
        """What is saved, with a frozen average that is excluded."""
        average = nn.Linear(2, 2).requires_grad_(False)
        loader = distckpt.PerRank(self.loader, on_resize=lambda states, rank, size: states[0])
        options = {"only_trainable": True, "exclude": ["average", "loader.cache"], **options}
        return distckpt.Checkpoint(
            model=self.model, optimizer=self.optimizer, average=average, loader=loader, **options
        )

    def facts(self) -> dict[str, Any]:
        """The one number that everything is, by key."""
        facts: dict[str, Any] = {"cursor": self.loader["cursor"]}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]["momentum_buffer"]
            for key, tensor in ((name, parameter), (f"{name}.momentum", state)):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                facts[key] = round(float(whole.detach().unique().item()), 5)
        return {**facts, "cache": self.loader["cache"].unique().tolist()}


def save(directory: str) -> dict[str, Any]:
    """Save twice under one layout, then with another layer that is trained; what there was, and the keys of each."""
    held = Held(1.0)
    found: dict[str, Any] = {"facts": held.facts(), "keys": []}
    with distckpt.CheckpointManager(held.checkpoint(), directory, max_to_keep=None, **OPTIONS) as manager:
        for number in (1, 2, 3):
            if number == 3:
                held.model[0].bias.requires_grad_(True)
            pending = manager.save(number)
            assert pending is not None
            with distckpt.open(pending.result(30)) as reader:
                found["keys"].append(reader.keys())
    return found


def restore(directory: str, which: int) -> dict[str, Any]:
    """Restore it into other values; what there was before and is then, and what was missing."""
    held = Held(7.0)
    before = held.facts()
    with distckpt.CheckpointManager(held.checkpoint(), directory, **OPTIONS) as manager:
        manager.restore(which)
        status = manager.restore_status
        assert status is not None
        return {"before": before, "after": held.facts(), "missing": status.missing, "unexpected": status.unexpected}


def refusals(directory: str) -> list[str]:
    """What is said of a text that no rank has, of ranks that leave out different things, and of one that only one has."""
    rank, told = dist.get_rank(), []
    for at, exclude in enumerate((["modle"], ["model.0"] if rank else ["model.1"], ["of.0", "of.1"])):
        checkpoint = distckpt.Checkpoint(
            model=nn.Linear(3, 3), of={f"{rank}": torch.ones(2), "all": 1}, exclude=exclude
        )
        with torch.no_grad():
            checkpoint.model.weight.fill_(0)
            checkpoint.model.bias.fill_(0)
        try:
            with distckpt.CheckpointManager(checkpoint, f"{directory}/{at}", **OPTIONS) as manager:
                pending = manager.save(1)
                assert pending is not None
                told.append(" ".join(sorted(distckpt.load(pending.result(30))["of"])))
        except DistckptError as error:
            told.append(str(error))
    return told


def tune_from_base(base: str, directory: str) -> dict[str, Any]:
    """Save a base, begin from it with other numbers, train what is not frozen, save; all that there is then."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(40, 200), nn.Linear(200, 2))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
        return model

    path = distckpt.Checkpoint(model=sharded(7)).save(base)
    model = sharded(1)
    model[0].requires_grad_(False)
    optimizer = optim.Adam((each for each in model.parameters() if each.requires_grad), lr=0.1)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, only_trainable="model", frozen_from=path)
    with distckpt.CheckpointManager(checkpoint, directory, **OPTIONS) as manager:
        manager.restore_or_initialize()
        model(torch.ones(5, 40)).square().sum().backward()
        optimizer.step()
        pending = manager.save(1)
        assert pending is not None
        with distckpt.open(pending.result(30)) as reader:
            left_out = reader.manifest.left_out
    assert left_out is not None
    assert left_out.base is not None
    state = {
        name: value.full_tensor().tolist() for name, value in model.state_dict().items() if isinstance(value, DTensor)
    }
    return {"state": state, "left_out": left_out.base.path}
