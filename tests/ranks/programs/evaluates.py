"""An evaluation job of several ranks that is one worker of a group: python evaluates.py DIRECTORY"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt


def main(directory: str) -> None:
    """What docs/EVALUATION.md shows."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = torch.nn.Linear(6, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    checkpoints = distckpt.watch(directory, group="eval", mode="all") if rank == 0 else None
    while True:
        checkpoint = next(checkpoints, None) if checkpoints else None
        told: list[Any] = [checkpoint.path if checkpoint else None]
        dist.broadcast_object_list(told)
        if told[0] is None:
            break
        with checkpoint or contextlib.nullcontext():
            distckpt.Checkpoint(model=model).restore(told[0])
            total = model.weight.to_local().detach().sum()
            dist.all_reduce(total)
            if checkpoint:
                checkpoint.report({"sum": total})
                print(f"{checkpoint.number} {model.weight.to_local().shape[0]} {total.item():g}", flush=True)
    dist.destroy_process_group()


main(sys.argv[1])
