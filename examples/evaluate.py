"""Follow a training run from outside: evaluate every checkpoint as it is committed. Needs no Ray and no ranks.

python examples/evaluate.py --directory runs/gpt
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from gpt import GPT, Shape, standard_library, windows
from witness import digest

import distckpt
from distckpt.errors import CheckpointNotFoundError, DamagedError


def held_out_loss(model: GPT, samples: int) -> float:
    """The mean loss on modules that training never sees, in nats a byte."""
    text, context = standard_library(held_out=True), Shape().context
    starts = torch.linspace(0, len(text) - context - 1, samples).long()
    losses = [model(*windows(text, starts[at : at + 16], context)) for at in range(0, samples, 16)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def evaluate(path: str, model: GPT, samples: int) -> dict[str, object]:
    """Loss and digests of the checkpoint's model, which was sharded while it was trained and is whole here."""
    began = time.perf_counter()
    weights = distckpt.load(path, select="model")
    read = time.perf_counter() - began
    model.load_state_dict(weights)
    digests = {f"model.{name}": digest(tensor) for name, tensor in weights.items()}
    return {"checkpoint": path, "loss": held_out_loss(model, samples), "read_seconds": read, "tensors": digests}


def follow(directory: str, until: int | None, timeout: float, samples: int, out: str | None) -> None:
    """Evaluate until checkpoint ``until`` has been, or nothing new has come for ``timeout`` seconds."""
    model = GPT(Shape()).eval()
    for path in distckpt.checkpoints_iterator(directory, timeout=timeout):
        try:
            result = evaluate(path, model, samples)
        except (CheckpointNotFoundError, DamagedError) as error:
            # Retention may take a checkpoint away while it is read; part of one is never taken for the whole.
            if distckpt.latest_checkpoint(directory) == path:
                raise
            print(f"{path} is passed over, there is a newer one: {error}", file=sys.stderr)
            continue
        print(f"{path}: loss {result['loss']:.4f}", flush=True)
        if out is not None:
            with Path(out).open("a") as file:
                file.write(json.dumps({"time": time.time(), **result}) + "\n")
        if until is not None and number_of(path) >= until:
            return


def number_of(path: str) -> int:
    """42 for ``runs/gpt/ckpt-42``."""
    return int(path.rpartition("-")[2])


def main() -> None:
    """Read the command line and follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="the directory of the training run")
    parser.add_argument("--until", type=int, help="end after this checkpoint")
    parser.add_argument("--timeout", type=float, default=600, help="end when nothing new comes for so many seconds")
    parser.add_argument("--samples", type=int, default=64, help="how many windows of 128 bytes to look at")
    parser.add_argument("--out", help="append a line of JSON a checkpoint to this file")
    given = parser.parse_args()
    follow(given.directory, given.until, given.timeout, given.samples, given.out)


if __name__ == "__main__":
    main()
