"""Rank functions for tests of where a run's directory is, and what is in it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DistckptError


def save_by_own_name(directories: list[str]) -> str:
    """Save and restore number 1, each rank by its own name for the directory; the path as this rank has it."""
    state = {"weight": torch.full((4,), 7.0)}
    checkpoint = distckpt.Checkpoint(state=state)
    with distckpt.CheckpointManager(checkpoint, directories[dist.get_rank()], save_timeout=60) as manager:
        pending = manager.save(1)
        assert pending is not None
        pending.result(60)
        return manager.restore()


def refused(directory: str) -> tuple[str, str]:
    """What a manager of this directory is refused with."""
    try:
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), directory, save_timeout=60)
    except DistckptError as error:
        return type(error).__name__, str(error)
    return "", ""


def restore_in_what_has_vanished(directory: str) -> dict[str, str]:
    """What a restore raises while the directory is away, and what it returns once it is back."""
    run, away, rank = Path(directory, "run"), Path(directory, "away"), dist.get_rank()
    with distckpt.CheckpointManager(distckpt.Checkpoint(step=1), run, save_timeout=60) as manager:
        pending = manager.save(1)
        assert pending is not None
        pending.result(60)
        dist.barrier()
        if rank == 0:
            run.rename(away)
        dist.barrier()
        try:
            manager.restore_or_initialize()
            raised = ""
        except DistckptError as error:
            raised = f"{type(error).__name__}: {error}"
        dist.barrier()
        if rank == 0:
            away.rename(run)
        dist.barrier()
        return {"raised": raised, "restored": manager.restore()}
