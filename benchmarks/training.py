"""A transformer with exactly 300 parameters, 100 million numbers, small enough to train on two CPU ranks."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 480
HIDDEN = 1280
HEADS = 8
WORDS = 9000
BLOCKS = 33


class Block(nn.Module):
    """Attention and a gated feed-forward part, each behind a norm: 9 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.forward_norm = nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is (batch, length, WIDTH), and so is the result."""
        y = self.attention_norm(x)
        heads = [part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))
        y = self.forward_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """Words in, scores of the next word out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """``words`` is (batch, length); the result is (batch, length, WORDS)."""
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
