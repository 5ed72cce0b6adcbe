"""Saves measured: until durable and committed, and how long the training loop stands still. Runs on two ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Dcp, DcpAsync, Distckpt, RawWrite, TorchSave
from rounds import Contender, alternate, now
from states import Copy, nbytes, sharded_state
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Transformer

import distckpt

RAW_FILES = (1, 2, 4)
RAW_TRIES = 1
PAUSE_SECONDS = 0.1


def save_state(folder: str, repetitions: int) -> dict[str, Any]:
    """Everyone saves 1.2 GB of DTensors in a nested dict, until it is durable."""
    root, tree = Path(folder), {"train": sharded_state()}
    copy = Copy(tree)  # its memory is what the bare writes write
    ours = Distckpt(distckpt.Checkpoint(**tree), root / "distckpt")
    bare = [_best_bare(copy, root, direct) for direct in (True, False)]
    contenders: list[Contender] = [
        ours,
        Dcp(tree, root),
        Dcp(tree, root, threads=2),
        DcpAsync(lambda: tree, root),
        TorchSave(tree, root),
        *bare,
    ]
    measured = alternate(contenders, repetitions)
    ours.manager.close()
    return {"bytes": nbytes(tree), "measured": measured}


def stall(folder: str, repetitions: int) -> dict[str, Any]:
    """Only what training waits for; the bare writes' wear on the disk stays out of it."""
    root, tree = Path(folder), {"train": sharded_state()}
    ours = Distckpt(distckpt.Checkpoint(**tree), root / "distckpt")
    measured = alternate([Copy(tree), ours, DcpAsync(lambda: tree, root)], repetitions)
    ours.manager.close()
    return {"bytes": nbytes(tree), "measured": measured}


def _best_bare(copy: Copy, folder: Path, direct: bool) -> RawWrite:
    """The number of files with which this disk is fastest; found before the rounds, lest they only wear the disk out."""
    ways = [RawWrite(copy.memory, folder, files, direct) for files in RAW_FILES]
    tried = alternate(ways, RAW_TRIES)
    seconds = [min(end - begin for begin, end in tried[way.name]["durable"]) for way in ways]
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return ways[int(slowest.argmin())]


def save_training(folder: str, repetitions: int) -> dict[str, Any]:
    """An FSDP2 transformer of 300 parameters and its AdamW, collected anew at every save."""
    root = Path(folder)
    model = Transformer()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.arange(16).view(1, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    tree = state()
    ours = Distckpt(distckpt.Checkpoint(model=model, optimizer=optimizer), root / "distckpt")
    measured = alternate([Copy(tree), ours, DcpAsync(state, root)], repetitions)
    ours.manager.close()
    return {
        "bytes": nbytes(tree),
        "parameters": len(list(model.parameters())),
        "measured": measured,
    }


def save_small(folder: str, repetitions: int) -> dict[str, Any]:
    """Saves of a few MB: when the last shard was written, and when this rank was told that all is committed.

    Both in nanoseconds of the wall clock. A shard's time is that of its last write, so what is measured from there
    includes its fsync, and up to a tick of the kernel's clock.
    """
    tree = sharded_state(layers=2, shape=(256, 1024))
    landed, told, durable = [], [], []
    with distckpt.CheckpointManager(distckpt.Checkpoint(train=tree), folder) as manager:
        manager.prepare()
        for number in range(repetitions + 1):
            dist.barrier()
            begin = now()
            pending = manager.save(number)
            path = Path(pending.result())
            told.append(time.time_ns())
            durable.append((begin, now()))
            dist.barrier()
            landed.append(max(shard.stat().st_mtime_ns for shard in path.glob("*/*-*.arrow")))
            time.sleep(PAUSE_SECONDS)
    return {"bytes": nbytes(tree), "landed": landed[1:], "told": told[1:], "durable": durable[1:]}
