"""Rank functions with a fake-quantized model, as a module or as an exported program, sharded where there are ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.training.quantization import do_quantize_training
from tests.ranks.saves import digest

ROWS = 12
"""In a batch of all ranks together."""


class Small(nn.Module):
    """A convolution and two layers that read the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.left = nn.Linear(48, 5)
        self.right = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(self.conv(x)).flatten(1)
        return self.left(seen) + torch.tanh(self.right(seen))


def make(kind: str, seed: int, num_bits: int = 8) -> nn.Module:
    """A quantized "module" or "program" of the same parameters for the same seed."""
    torch.manual_seed(seed)
    model = Small()
    if kind == "module":
        return do_quantize_training(model, num_bits)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.zeros(2, 1, 6, 6),), dynamic_shapes=(batch,))
    return do_quantize_training(program, num_bits)


def batch(step: int) -> torch.Tensor:
    """What all ranks together train on in a step; every row has a range of its own."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 1, 6, 6, generator=generator) * torch.arange(1, ROWS + 1).view(-1, 1, 1, 1)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Train on this rank's part of each batch; the loss of all ranks in every step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in steps:
        mine = batch(step).chunk(size)[rank]
        loss = (model(mine) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def ranges(model: nn.Module) -> dict[str, float]:
    """What every observer has seen."""
    return {key: float(value) for key, value in model.state_dict().items() if key.endswith(("min_val", "max_val"))}


def trained(directory: str, kind: str, steps: int, *, restore: bool) -> dict[str, Any]:
    """Train from the start, saving after steps 2 and ``steps``, or go on from the checkpoint of step 2."""
    model = make(kind, seed=7 if restore else 0)
    if dist.is_initialized():
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        losses = []
        if restore:
            manager.restore(2)
        else:
            losses = run_steps(model, optimizer, range(2))
            manager.save(2)
        middle = digest(model, optimizer)
        losses += run_steps(model, optimizer, range(2, steps))
        manager.save(steps).result(30)
    return {"middle": middle, "end": digest(model, optimizer), "losses": losses, "ranges": ranges(model)}


def uneven_batches() -> list[list[float]]:
    """A layer's range after each of four batches; ranks 0 and 1 are a group, others are alone."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), *(dist.new_group([alone]) for alone in range(2, dist.get_world_size()))]
    model = do_quantize_training(nn.Sequential(nn.Linear(1, 1)), 8, group=groups[max(0, rank - 1)])
    model = copy.deepcopy(model)
    found = []
    for values in (
        [-float(rank + 1), 10.0 * (rank + 1)],
        [] if rank == 1 else [1000.0],
        [float("nan")] if rank == 1 else [2000.0],
        [] if rank < 2 else [-3000.0],
    ):
        model(torch.tensor(values).reshape(-1, 1))
        found.append([value for key, value in ranges(model).items() if "activation_fake" in key])
    return found


def quantize_what_is_sharded() -> str:
    """What is said when it is too late."""
    model = nn.Linear(4, 4)
    fully_shard(model)
    try:
        do_quantize_training(model, 8)
    except ValueError as error:
        return str(error)
    return ""
