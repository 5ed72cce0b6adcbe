"""Train a small GPT with FSDP2; stop it at any moment and go on with any number of ranks. How distckpt is used.

torchrun --nproc-per-node 2 examples/train.py --directory runs/gpt --steps 50
torchrun --nproc-per-node 3 examples/train.py --directory runs/gpt --steps 100
python examples/train.py --directory runs/gpt --steps 120
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gpt import GPT, Loader, Shape, share_anew, standard_library
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

import distckpt


@dataclass(frozen=True)
class Options:
    """``batch`` is that of all ranks together, which must divide it; ``keep`` checkpoints stay."""

    directory: str
    steps: int = 100
    save_every: int = 10
    keep: int = 5
    batch: int = 12


def train(options: Options) -> None:
    """Train up to step ``options.steps``, from the newest good checkpoint on if there is one. All ranks call it."""
    training = Training(options)
    with distckpt.CheckpointManager(training.checkpoint(), options.directory, max_to_keep=options.keep) as manager:
        manager.restore_or_initialize()
        for tokens, targets in training.loader:
            if training.progress["step"] >= options.steps:
                break
            loss = training.step(tokens, targets)
            step = training.progress["step"]
            if training.rank == 0:
                print(f"step {step}: loss {loss:.4f}", flush=True)
            if step % options.save_every == 0:
                manager.save(step)  # copies the state; the rest happens while training goes on


class Training:
    """What one rank trains: its part of the model, and its share of the data."""

    def __init__(self, options: Options) -> None:
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if options.batch % self.world_size:
            raise ValueError(f"{self.world_size} ranks cannot share batches of {options.batch} samples evenly")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.model = make_model(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        self.scheduler = LambdaLR(self.optimizer, warm_up_then_decay)
        share = options.batch // self.world_size
        text = standard_library(held_out=False)
        self.loader = Loader(text, Shape().context, share, self.rank, self.world_size)
        self.progress = {"step": 0}

    def checkpoint(self) -> distckpt.Checkpoint:
        """All that training needs to go on where it stopped."""
        return distckpt.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=self.progress,
            loader=distckpt.PerRank(self.loader, on_resize=share_anew),
            random=distckpt.PerRank(distckpt.RandomState(), on_resize="drop"),
        )

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step of the optimizer; the mean loss over all ranks."""
        loss = self.model(tokens.to(self.device), targets.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.progress["step"] += 1
        return mean(loss)


def make_model(device: torch.device) -> GPT:
    """The same model on every rank, each holding its part of it."""
    torch.manual_seed(0)
    model = GPT(Shape()).to(device)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def warm_up_then_decay(step: int) -> float:
    """The factor of the learning rate."""
    return min(1.0, (step + 1) / 20) / math.sqrt(1 + step / 100)


def mean(loss: Tensor) -> float:
    """The mean over all ranks."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss, dist.ReduceOp.SUM)
        loss /= dist.get_world_size()
    return loss.item()


def join_ranks() -> None:
    """Join the others if torchrun has started this process as one of several."""
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave_ranks() -> None:
    """The end of what ``join_ranks`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line, with a member of ``Options`` for each argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="where checkpoints are, shared by all ranks")
    parser.add_argument("--steps", type=int, default=Options.steps, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=Options.save_every, help="steps between two checkpoints")
    parser.add_argument("--keep", type=int, default=Options.keep, help="how many checkpoints stay")
    return parser


def main() -> None:
    """One rank of torchrun, or the only process there is."""
    given = make_parser(__doc__).parse_args()
    join_ranks()
    train(Options(**vars(given)))
    leave_ranks()


if __name__ == "__main__":
    main()
