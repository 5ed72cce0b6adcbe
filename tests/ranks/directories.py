"""Rank functions for tests of where a run's directory is, and what is in it."""

from __future__ import annotations

import torch
import torch.distributed as dist

import distckpt


def save_by_own_name(directories: list[str]) -> str:
    """Save and restore number 1, each rank by its own name for the directory; the path as this rank has it."""
    state = {"weight": torch.full((4,), 7.0)}
    checkpoint = distckpt.Checkpoint(state=state)
    with distckpt.CheckpointManager(checkpoint, directories[dist.get_rank()], save_timeout=60) as manager:
        pending = manager.save(1)
        assert pending is not None
        pending.result(60)
        return manager.restore()
