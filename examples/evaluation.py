"""Train in one process, and evaluate every checkpoint in others, on as many machines as there are. Needs nothing but storage.

python examples/evaluation.py train --directory runs/line
python examples/evaluation.py evaluate --directory runs/line        (in other terminals, as often as you like)

Kill any of them at any moment, and start it again or not: no checkpoint is missed, and none counts twice.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import distckpt


def train(directory: str, steps: int, seconds: float, keep: int) -> None:
    """Fit a line; save after every step, and keep few. What nobody has evaluated yet stays besides."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, step=0)
    with distckpt.CheckpointManager(checkpoint, directory, max_to_keep=keep) as manager:
        manager.restore_or_initialize()
        while checkpoint.step < steps:
            loss = error(model, seed=checkpoint.step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(seconds)  # a real step takes longer
            checkpoint.step += 1
            manager.save(checkpoint.step)
        manager.close(final=True)  # training is over: so those who evaluate end when they have done the rest


def evaluate(directory: str, worker: str | None, seconds: float, lease_seconds: float) -> None:
    """One of any number of workers. Each checkpoint comes to one of them, and stays until it is done with it."""
    model = nn.Linear(8, 1)
    checkpoints = distckpt.watch(
        directory, group="evaluation", mode="all", on_lag="hold", worker=worker, lease_seconds=lease_seconds
    )
    for checkpoint in checkpoints:
        print(f"begin {checkpoint.number}", flush=True)
        with checkpoint:  # acknowledged at its end; given back if it raises, and taken over if this process dies
            model.load_state_dict(checkpoint.load("model"))
            time.sleep(seconds)  # a real evaluation takes longer
            loss = error(model, seed=-1).item()
            checkpoint.report({"held_out_loss": loss})
        print(f"done {checkpoint.number}: loss {loss:.4f}", flush=True)


def error(model: nn.Module, seed: int) -> Tensor:
    """How far the model is from the line, at 64 points that depend on the seed."""
    points = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed + 1))
    wanted = points @ torch.linspace(-1, 1, 8)
    return nn.functional.mse_loss(model(points).squeeze(-1), wanted)


def main() -> None:
    """Read the command line, and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="fit a line, and save it after every step")
    training.add_argument("--steps", type=int, default=100)
    training.add_argument("--keep", type=int, default=2, help="how many checkpoints stay")
    training.set_defaults(run=train)
    evaluating = commands.add_parser("evaluate", help="evaluate its checkpoints, as one of several workers")
    evaluating.add_argument("--worker", help="a name for people")
    evaluating.add_argument("--lease-seconds", type=float, default=60.0, help="after so long a dead worker is replaced")
    evaluating.set_defaults(run=evaluate)
    for command in (training, evaluating):
        command.add_argument("--directory", required=True, help="where the run saves to")
        command.add_argument("--seconds", type=float, default=1.0, help="how long a step, or an evaluation, takes")
    arguments = vars(parser.parse_args())
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    main()
