"""Rank functions that shard a model by FSDP2: on islands beside each other, and after a forward pass without a backward one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.directory.locate import locate, read_index
from distckpt.errors import SaveError
from distckpt.state.filler import Filler
from distckpt.state.stored import Committed


def islands(directory: str, differ: bool) -> dict[str, Any]:
    """Two ranks each share a model, and both pairs have the same one, or train apart."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("island", "shard"))
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    fully_shard(model, mesh=mesh["shard"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(float(rank // 2) if differ else 7.0)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), directory) as manager:
        try:
            manager.save(1).result(60)
        except SaveError as error:
            return {"error": str(error)}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        manager.restore(1)
    return {"error": "", "values": [parameter.to_local().unique().tolist() for parameter in model.parameters()]}


def evaluated(directory: str, order: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Save, and restore, right after the model was asked for something: its root holds whole parameters then."""
    model, optimizer = _trained(seed=0)
    objects = {"model": model, "optimizer": optimizer}
    checkpoint = distckpt.Checkpoint(**{name: objects[name] for name in order}, **options)
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        for number in (1, 2):
            _evaluate(model)
            manager.save(number).result(60)
        moments = [optimizer.state[parameter]["exp_avg"].full_tensor() for parameter in model.parameters()]
        _train(model, optimizer)
        _evaluate(model)
        manager.restore(2)
        same = [
            torch.equal(optimizer.state[parameter]["exp_avg"].full_tensor(), moment)
            for parameter, moment in zip(model.parameters(), moments, strict=True)
        ]
    with distckpt.open(directory) as reader:
        keys = [key for key in reader.keys() if key.endswith("exp_avg")]  # noqa: SIM118
    return {"keys": keys, "same": same}


def _trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[1])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    _train(model, optimizer)
    return model, optimizer


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 4)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(2, 4))


class Two(nn.Module):
    """Two layers, which may have one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(200, 4000, bias=False) for _ in range(2))
        if tied:
            self.other.weight = self.one.weight


def tied(directory: str) -> dict[str, Any]:
    """Two weights saved apart, restored where they are one: whether it is the later one, and how much was read for that."""
    apart, together = Two(tied=False), Two(tied=True)
    for model in (apart, together):
        fully_shard(model)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=apart), directory) as manager:
        manager.save(1).result(60)
    where = locate(f"{directory}/ckpt-1")
    filler = Filler(
        distckpt.Checkpoint(model=together), Committed(where, read_index(where)), dist.get_rank(), dist.get_world_size()
    )
    filler.read()
    filler.finish()
    wanted, found = apart.other.weight.to_local(), together.one.weight.to_local()
    return {"same": torch.equal(wanted, found), "read": filler.bytes_read / (found.numel() * found.itemsize)}
