"""Rank functions that fill a sharded model from files of other programs."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import distckpt


def model() -> nn.Module:
    """Large enough that parts of it are more than what is read together at least."""
    return nn.Sequential(nn.Embedding(301, 128), nn.Linear(128, 256), nn.BatchNorm1d(256), nn.Linear(256, 129))


def filled(folder: str, whole: str) -> dict[str, Any]:
    """Fill a model, of which one layer is sharded by columns, from ``folder``; where it differs from what torch has saved
    at ``whole``, and how many bytes this rank has read."""
    sharded = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded[3], mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    fully_shard(sharded, mesh=mesh)
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.fill_(-1)
    reads: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[Any], offset: int) -> int:
        reads.append(preadv(fd, buffers, offset))
        return reads[-1]

    with distckpt.read_foreign(folder) as foreign:
        os.preadv = counted  # type: ignore[assignment]
        try:
            foreign.restore(distckpt.Checkpoint(model=sharded)).assert_consumed()
        finally:
            os.preadv = preadv
    wanted = torch.load(whole, weights_only=True)
    found = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in sharded.state_dict().items()
    }
    return {
        "differ": [name for name in wanted if not torch.equal(found[name], wanted[name])],
        "read": sum(reads),
        "whole": sum(tensor.numel() * tensor.element_size() for tensor in wanted.values()),
    }
