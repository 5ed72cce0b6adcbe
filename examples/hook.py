"""A training loop with hooks: checkpoints every few steps, a listener that stops it, and SIGTERM, which loses nothing.

python examples/hook.py --directory runs/hook --steps 200
torchrun --nproc-per-node 2 examples/hook.py --directory runs/hook --steps 400   # goes on at step 200

Send SIGTERM to any of its processes: all of them save the same step and end.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distckpt
from distckpt.training.hooks import Session

FEATURES, BATCH = 8, 16


class GoodEnough(distckpt.CheckpointSaverListener):
    """Tells of every checkpoint, and asks to stop once this rank's loss is low; one rank's word is enough."""

    def __init__(self, wanted: float) -> None:
        self.wanted, self.loss = wanted, float("inf")

    def after_save(self, session: Session, global_step_value: int) -> bool:
        """Called on every rank once the checkpoint is committed."""
        if session.rank == 0:
            print(f"step {global_step_value} is saved, loss {self.loss:.4f}", flush=True)
        return self.loss < self.wanted


def train(directory: str, steps: int, save_steps: int, loss: float) -> None:
    """Train up to step ``steps``, or until the loss is below ``loss``, from the newest checkpoint on. All ranks call it."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(FEATURES, 1)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    # The step is part of the checkpoint, so a resumed run goes on at the right one, and so does its data.
    progress = {"step": 0}
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, progress=progress)
    listener = GoodEnough(loss)
    hook = distckpt.CheckpointSaverHook(directory, save_steps=save_steps, listeners=[listener])

    def train_step() -> None:
        inputs, targets = batch(progress["step"], rank, world_size)
        error = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        listener.loss = error.item()
        progress["step"] += 1

    with distckpt.TrainingSession([hook], lambda: progress["step"], checkpoint=checkpoint) as session:
        while progress["step"] < steps and not session.should_stop():
            session.run(train_step)
    if rank == 0:
        print(f"ended at step {session.global_step}", flush=True)


def batch(step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the data of a step."""
    inputs = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(step))
    targets = inputs @ torch.linspace(-1, 1, FEATURES)[:, None]
    return inputs[rank::world_size], targets[rank::world_size]


def main() -> None:
    """One rank of torchrun, or the only process there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="where checkpoints are, shared by all ranks")
    parser.add_argument("--steps", type=int, default=1000, help="train up to this step")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--loss", type=float, default=1e-4, help="stop below this")
    given = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    train(given.directory, given.steps, given.save_steps, given.loss)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
