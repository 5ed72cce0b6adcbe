"""Saves of what is trained beside a frozen base, compared with saves of all: one rank, 1 % of a billion parameters."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rounds import Spans, alternate, now
from torch import nn

import distckpt

LAYERS = 99
WIDTH = 3178
"""So that a layer has ten million parameters."""


class Tuned(nn.Module):
    """Of a hundred layers the last one is trained."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, device="meta") for _ in range(LAYERS + 1)]
        self.layers = nn.ModuleList(layer.to_empty(device="cpu") for layer in layers)
        for layer in self.layers:
            for parameter in layer.parameters():
                nn.init.uniform_(parameter)
        self.layers[:LAYERS].requires_grad_(False)


def trained(model: Tuned) -> torch.optim.Optimizer:
    """Adam's moments of what is trained."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    for parameter in model.layers[-1].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@dataclass
class Saves:
    """A manager's saves, with its memory warm."""

    name: str
    directory: Path
    manager: distckpt.CheckpointManager

    def run(self, number: int) -> Spans:
        """One, until it is committed. Of what it costs training, and of its bytes, only the ends tell."""
        begin = now()
        pending = self.manager.save(number + 1)
        returned = now()
        assert pending is not None
        pending.result()
        return {"committed": (begin, now()), "stall": (begin, returned), "bytes": (0.0, float(pending.nbytes or 0))}

    def clean(self, number: int) -> None:
        """Retention does, and here it is waited for."""
        self.manager.wait()


def saves(folder: str, repetitions: int) -> dict[str, Any]:
    """All, and what is trained beside a base, in alternation."""
    where, model = Path(folder), Tuned()
    base = distckpt.Checkpoint(model=model).write(where / "base")
    optimizer = trained(model)
    everything = distckpt.Checkpoint(model=model, optimizer=optimizer)
    beside = distckpt.Checkpoint(model=model, optimizer=optimizer, only_trainable="model", frozen_from=base)
    ways = {"all": everything, "trained": beside}
    managers = [
        Saves(name, where / name, distckpt.CheckpointManager(checkpoint, where / name, max_to_keep=1))
        for name, checkpoint in ways.items()
    ]
    managers[1].manager.restore_or_initialize()
    measured = alternate(managers, repetitions)
    for one in managers:
        one.manager.close()
    shutil.rmtree(where)
    return {"measured": measured}
