"""Follow a training run from outside: evaluate every checkpoint as it is committed. Needs no Ray and no ranks.

python examples/evaluate.py --directory runs/gpt
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpt import GPT, Shape, standard_library, windows
from torch import Tensor

import distckpt
from distckpt.errors import CheckpointNotFoundError, DamagedError


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The model of one checkpoint: its weights, its held-out loss in nats a byte, the seconds that reading took."""

    path: str
    weights: dict[str, Tensor]
    loss: float
    read_seconds: float

    @property
    def number(self) -> int:
        """42 for ``runs/gpt/ckpt-42``."""
        return int(self.path.rpartition("-")[2])


def evaluations(directory: str, until: int | None, timeout: float, samples: int) -> Iterator[Evaluation]:
    """Of each checkpoint, until checkpoint ``until`` has come, or nothing new comes for ``timeout`` seconds."""
    model = GPT(Shape()).eval()
    for path in distckpt.checkpoints_iterator(directory, timeout=timeout):
        try:
            evaluation = evaluate(path, model, samples)
        except (CheckpointNotFoundError, DamagedError) as error:
            # Retention may take a checkpoint away while it is read; part of one is never taken for the whole.
            if distckpt.latest_checkpoint(directory) == path:
                raise
            print(f"{path} is passed over, there is a newer one: {error}", file=sys.stderr)
            continue
        yield evaluation
        if until is not None and evaluation.number >= until:
            return


def evaluate(path: str, model: GPT, samples: int) -> Evaluation:
    """The checkpoint's model, which was sharded while it was trained, is whole here."""
    began = time.perf_counter()
    weights = distckpt.load(path, select="model")
    read = time.perf_counter() - began
    model.load_state_dict(weights)
    return Evaluation(path, weights, held_out_loss(model, samples), read)


@torch.no_grad()
def held_out_loss(model: GPT, samples: int) -> float:
    """The mean loss on modules that training never sees, in nats a byte."""
    text, context = standard_library(held_out=True), Shape().context
    starts = torch.linspace(0, len(text) - context - 1, samples).long()
    losses = [model(*windows(text, starts[at : at + 16], context)) for at in range(0, samples, 16)]
    return torch.stack(losses).mean().item()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line, with an argument for each one of ``evaluations``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="the directory of the training run")
    parser.add_argument("--until", type=int, help="end after this checkpoint")
    parser.add_argument("--timeout", type=float, default=600, help="end when nothing new comes for so many seconds")
    parser.add_argument("--samples", type=int, default=64, help="how many windows of 128 bytes to look at")
    return parser


def main() -> None:
    """Read the command line and follow."""
    for evaluation in evaluations(**vars(make_parser(__doc__).parse_args())):
        print(f"{evaluation.path}: loss {evaluation.loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
