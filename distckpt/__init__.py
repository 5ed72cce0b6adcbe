"""Distributed, sharded, fault-tolerant checkpoints for PyTorch training on many machines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distckpt.checkpoint import Checkpoint as Checkpoint
    from distckpt.checkpoint import LoadStatus as LoadStatus
    from distckpt.checkpoint import PerRank as PerRank
    from distckpt.checkpoint import RandomState as RandomState
    from distckpt.loading import CheckpointReader as CheckpointReader
    from distckpt.loading import latest_checkpoint as latest_checkpoint
    from distckpt.loading import load as load
    from distckpt.loading import open as open
    from distckpt.manager import CheckpointManager as CheckpointManager
    from distckpt.saving import PendingSave as PendingSave
    from distckpt.state_file import CheckpointState as CheckpointState
    from distckpt.state_file import generate_checkpoint_state_proto as generate_checkpoint_state_proto
    from distckpt.state_file import get_checkpoint_state as get_checkpoint_state
    from distckpt.state_file import update_checkpoint_state as update_checkpoint_state
    from distckpt.watching import checkpoints_iterator as checkpoints_iterator
    from distckpt.watching import wait_for_new_checkpoint as wait_for_new_checkpoint

# Looked up when first used: reading a log or running the coordinator needs no torch, and torch takes seconds to import.
_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager",
    "CheckpointReader": "loading",
    "CheckpointState": "state_file",
    "LoadStatus": "checkpoint",
    "PendingSave": "saving",
    "PerRank": "checkpoint",
    "RandomState": "checkpoint",
    "checkpoints_iterator": "watching",
    "generate_checkpoint_state_proto": "state_file",
    "get_checkpoint_state": "state_file",
    "latest_checkpoint": "loading",
    "load": "loading",
    "open": "loading",
    "update_checkpoint_state": "state_file",
    "wait_for_new_checkpoint": "watching",
}

__all__ = sorted([*_HOMES, "errors"])  # noqa: PLE0605 - derived, so that it cannot disagree


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"distckpt.{_HOMES[name]}"), name)
    if name == "errors":
        return importlib.import_module("distckpt.errors")
    raise AttributeError(f"module 'distckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
