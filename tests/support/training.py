"""Something that is trained in no time."""

from __future__ import annotations

import torch

import distckpt


class Training:
    """Something to train and to save: ``step`` counts, and the weight grows with it."""

    def __init__(self) -> None:
        self.progress = {"step": 0}
        self.weight = torch.zeros(3)
        self.checkpoint = distckpt.Checkpoint(progress=self.progress, weight=self.weight)

    @property
    def at(self) -> int:
        return self.progress["step"]

    def step(self) -> int:
        self.progress["step"] += 1
        self.weight += 1
        return self.at
