"""Train a small GPT with FSDP2; stop it at any moment and go on with any number of ranks. How distckpt is used.

torchrun --nproc-per-node 2 examples/train.py --directory runs/gpt --steps 50
torchrun --nproc-per-node 3 examples/train.py --directory runs/gpt --steps 100
python examples/train.py --directory runs/gpt --steps 120
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from gpt import GPT, Loader, Shape, share_anew, standard_library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from witness import Witness, Witnessed

import distckpt


@dataclass(frozen=True)
class Options:
    """``batch`` is that of all ranks together, which must divide it; ``keep`` checkpoints stay."""

    directory: str
    steps: int = 100
    save_every: int = 10
    keep: int = 5
    batch: int = 12
    witnessed: Witnessed = field(default_factory=Witnessed)


def train(options: Options) -> None:
    """Train up to step ``options.steps``, from the newest good checkpoint on if there is one. All ranks call it."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if options.batch % world_size:
        raise ValueError(f"{world_size} ranks cannot share batches of {options.batch} samples evenly")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model, optimizer, scheduler = build(device)
    shape = Shape()
    loader = Loader(standard_library(held_out=False), shape.context, options.batch // world_size, rank, world_size)
    progress = {"step": 0}
    witness = Witness(options.witnessed, model, optimizer, {"scheduler": scheduler, "progress": progress})

    checkpoint = distckpt.Checkpoint(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=progress,
        loader=distckpt.PerRank(loader, on_resize=share_anew),
        random=distckpt.PerRank(distckpt.RandomState(), on_resize="drop"),
    )
    with distckpt.CheckpointManager(checkpoint, options.directory, max_to_keep=options.keep) as manager:
        restored = manager.restore_or_initialize()
        witness.started(restored, progress["step"])
        for tokens, targets in loader:
            if progress["step"] >= options.steps:
                break
            loss = model(tokens.to(device), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            progress["step"] += 1
            witness.stepped(progress["step"], mean(loss), loader.start + world_size * loader.taken)
            if progress["step"] % options.save_every == 0:
                witness.saving(progress["step"])
                pending = manager.save(progress["step"])  # copies the state; the rest happens while training goes on
                witness.saved(progress["step"], pending)
    witness.ended()


def build(device: torch.device) -> tuple[GPT, torch.optim.Optimizer, LambdaLR]:
    """The same model on every rank, each holding its part of it."""
    torch.manual_seed(0)
    model = GPT(Shape()).to(device)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    return model, optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) / math.sqrt(1 + step / 100))


def mean(loss: torch.Tensor) -> float:
    """The mean over all ranks."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss, dist.ReduceOp.SUM)
        loss /= dist.get_world_size()
    return loss.item()


def parse(arguments: list[str] | None = None) -> Options:
    """The options as given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="where checkpoints are, shared by all ranks")
    parser.add_argument("--steps", type=int, default=Options.steps, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=Options.save_every, help="steps between two checkpoints")
    parser.add_argument("--keep", type=int, default=Options.keep, help="how many checkpoints stay")
    Witnessed.add_arguments(parser)
    given = parser.parse_args(arguments)
    return Options(given.directory, given.steps, given.save_every, given.keep, witnessed=Witnessed.of(given))


def main() -> None:
    """One rank of torchrun, or the only process there is."""
    options = parse()
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    train(options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
