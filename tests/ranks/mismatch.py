"""Rank functions that restore what does not match, on some ranks or all, and look whether anything was changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distckpt
from distckpt.errors import DistckptError, MismatchError


class Training:
    """A small training: model, optimizer with two groups, scheduler, values, and a cursor of each rank's own."""

    def __init__(self, seed: int, head: int = 2, extra: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, head))
        if extra:
            self.model.append(nn.Linear(head, 3))
        groups = [
            {"params": list(self.model[0].parameters()), "lr": 0.1 * seed},
            {"params": list(self.model[1:].parameters()), "lr": 0.01 * seed},
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, seed)
        self.values: dict[str, Any] = {"seed": seed, "history": [seed] * seed}
        self.cursor = {"at": 100 * seed + dist.get_rank()}
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def checkpoint(self, **more: Any) -> distckpt.Checkpoint:
        return distckpt.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            values=self.values,
            mine=distckpt.PerRank(self.cursor),
            **more,
        )

    def state(self) -> list[Any]:
        """All of it, as it is now."""
        objects = (self.model, self.optimizer, self.scheduler)
        return copy.deepcopy([*(one.state_dict() for one in objects), self.values, self.cursor])


def is_same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def refuse(directory: str, odd: dict[str, dict[str, Any]], partial: dict[str, bool] | None = None) -> dict[str, Any]:
    """Save, then restore into objects of which those of some ranks are ``odd``; how it ends on this rank."""
    rank = str(dist.get_rank())
    with distckpt.CheckpointManager(Training(1).checkpoint(gone=torch.ones(2)), directory, save_timeout=30) as manager:
        manager.save(1)
        manager.wait()
        manager.save(2)
    training = Training(2, **odd.get(rank, {}))
    before = training.state()
    with distckpt.CheckpointManager(training.checkpoint(), directory, save_timeout=30) as manager:
        try:
            manager.restore(partial=(partial or {}).get(rank, False))
        except MismatchError as error:
            listed = [sorted(error.missing), sorted(error.unexpected), error.misshaped]
            return {"error": f"{error}", "lists": listed, "same": is_same(before, training.state())}
        except DistckptError as error:
            return {"error": f"{type(error).__name__}: {error}", "same": is_same(before, training.state())}
    return {"error": "", "same": is_same(before, training.state())}


def restore_in_part(directory: str) -> dict[str, Any]:
    """Save, and restore in part into a model with another head and one layer more on rank 1; what came of it."""
    saved = Training(1)
    with distckpt.CheckpointManager(saved.checkpoint(gone=torch.ones(2)), directory, save_timeout=30) as manager:
        manager.save(1)
    model = Training(2, head=5).model if dist.get_rank() == 0 else Training(2, head=5, extra=True).model
    before = copy.deepcopy(model.state_dict())
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), directory, save_timeout=30) as manager:
        path = manager.restore(1, partial=True)
        status = manager.restore_status
    assert status is not None
    return {
        "path": path,
        "filled": is_same(model[0].state_dict(), saved.model[0].state_dict()),
        "kept": all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key[0] != "0"),
        "missing": sorted(status.missing),
        "mismatched": status.mismatched,
        "unexpected": sorted({key.partition(".")[0].partition("@")[0] for key in status.unexpected}),
    }


def nothing_in_common(directory: str) -> str:
    """Restore, in part, objects of which the checkpoint has none."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(a={"x": 1}), directory, save_timeout=30) as manager:
        manager.save(1)
    with distckpt.CheckpointManager(distckpt.Checkpoint(b=torch.ones(2)), directory, save_timeout=30) as manager:
        try:
            manager.restore(partial=True)
        except MismatchError as error:
            return str(error)
    return ""
