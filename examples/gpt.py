"""A small GPT on bytes, and the text that it learns: the source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the model is. The default has 1.9 million parameters; with the state of AdamW that is 23 MB."""

    width: int = 192
    layers: int = 4
    heads: int = 6
    context: int = 128
    tokens: int = 256


class Block(nn.Module):
    """Attention to what came before, then two linear layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.mixed = nn.Linear(shape.width, shape.width)
        self.norm_layers = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        x = x + self.attention(self.norm_attention(x))
        onward: Tensor = x + self.down(F.gelu(self.up(self.norm_layers(x))))
        return onward

    def attention(self, x: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.mixed(attended.transpose(1, 2).reshape(batch, length, width))
        return mixed


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.tokens, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.tokens)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats a byte; both are int64 [batch, length]."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def standard_library(*, held_out: bool) -> Tensor:
    """The bytes of its modules, in order of name, as uint8; every tenth module is held out."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [module for at, module in enumerate(modules) if (at % 10 == 9) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(module.read_bytes() for module in chosen)), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """What to read and what comes next, both int64 [len(starts), context]."""
    cut = text[starts[:, None] + torch.arange(context + 1)].long()
    return cut[:, :-1], cut[:, 1:]


class Loader:
    """One rank's endless batches. Together the ranks take the samples in one fixed order, each of them once.

    Rank r of w takes every w-th sample from ``start + r`` on and has taken ``taken`` of them. Since which samples come
    next is decided by those two numbers, they are all that has to be saved.
    """

    def __init__(self, text: Tensor, context: int, batch: int, rank: int, world_size: int) -> None:
        self.text, self.context, self.batch = text, context, batch
        self.rank, self.world_size = rank, world_size
        self.start = self.taken = 0
        self.order = torch.randperm(len(text) // context - 1, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            numbers = self.start + self.rank + self.world_size * torch.arange(self.taken, self.taken + self.batch)
            self.taken += self.batch
            yield windows(self.text, self.order[numbers % len(self.order)] * self.context, self.context)

    def state_dict(self) -> dict[str, int]:
        """Where this rank is."""
        return {"start": self.start, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there."""
        self.start, self.taken = state["start"], state["taken"]


def share_anew(states: Sequence[Mapping[str, int]], rank: int, world_size: int) -> dict[str, int]:
    """Where a rank goes on when the number of ranks has changed: after the last sample that any rank has taken."""
    return {"start": states[0]["start"] + sum(state["taken"] for state in states), "taken": 0}
