"""Small things to train, for tests."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Two linear layers, a norm and a buffer; sizes that do not divide evenly."""

    seen: torch.Tensor

    def __init__(self, width: int = 10, hidden: int = 22) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        normed: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
        return normed


def make_model(seed: int = 0, depth: int = 2) -> nn.Sequential:
    """The same parameters for the same seed, on every rank."""
    torch.manual_seed(seed)
    return nn.Sequential(*[Block() for _ in range(depth)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, seed: int = 1) -> float:
    """A few steps on random data; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        x = torch.randn(4, 10, generator=generator)
        loss = (model(x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
