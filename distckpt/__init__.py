"""Distributed, sharded, fault-tolerant checkpoints for PyTorch training on many machines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distckpt.agreeing import Agreement as Agreement
    from distckpt.checkpoint import Checkpoint as Checkpoint
    from distckpt.checkpoint import LoadStatus as LoadStatus
    from distckpt.checkpoint import PerRank as PerRank
    from distckpt.checkpoint import RandomState as RandomState
    from distckpt.coordinator.threads import Coordinator as Coordinator
    from distckpt.coordinator.threads import LooperThread as LooperThread
    from distckpt.exporting.listing import export_number as export_number
    from distckpt.exporting.listing import exports_iterator as exports_iterator
    from distckpt.exporting.listing import latest_export as latest_export
    from distckpt.exporting.listing import list_exports as list_exports
    from distckpt.exporting.listing import wait_for_new_export as wait_for_new_export
    from distckpt.exporting.manager import ExportCheckpointManager as ExportCheckpointManager
    from distckpt.exporting.recipes import Export as Export
    from distckpt.hooks import CheckpointSaverHook as CheckpointSaverHook
    from distckpt.hooks import CheckpointSaverListener as CheckpointSaverListener
    from distckpt.hooks import Scaffold as Scaffold
    from distckpt.hooks import SecondOrStepTimer as SecondOrStepTimer
    from distckpt.hooks import SessionRunArgs as SessionRunArgs
    from distckpt.hooks import SessionRunContext as SessionRunContext
    from distckpt.hooks import SessionRunHook as SessionRunHook
    from distckpt.hooks import SessionRunValues as SessionRunValues
    from distckpt.hooks import current_session as current_session
    from distckpt.loading import CheckpointReader as CheckpointReader
    from distckpt.loading import checkpoint_exists as checkpoint_exists
    from distckpt.loading import get_checkpoint_mtimes as get_checkpoint_mtimes
    from distckpt.loading import latest_checkpoint as latest_checkpoint
    from distckpt.loading import load as load
    from distckpt.loading import open as open
    from distckpt.manager import CheckpointManager as CheckpointManager
    from distckpt.quantizing import do_quantize_training as do_quantize_training
    from distckpt.saving import PendingSave as PendingSave
    from distckpt.session import HookedLoop as HookedLoop
    from distckpt.session import TrainingSession as TrainingSession
    from distckpt.state_file import CheckpointState as CheckpointState
    from distckpt.state_file import generate_checkpoint_state_proto as generate_checkpoint_state_proto
    from distckpt.state_file import get_checkpoint_state as get_checkpoint_state
    from distckpt.state_file import update_checkpoint_state as update_checkpoint_state
    from distckpt.watching import checkpoints_iterator as checkpoints_iterator
    from distckpt.watching import wait_for_new_checkpoint as wait_for_new_checkpoint

# Looked up when first used: reading a log or running the coordinator needs no torch, and torch takes seconds to import.
_HOMES = {
    "Agreement": "agreeing",
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager",
    "CheckpointReader": "loading",
    "CheckpointSaverHook": "hooks",
    "CheckpointSaverListener": "hooks",
    "CheckpointState": "state_file",
    "Coordinator": "coordinator.threads",
    "Export": "exporting.recipes",
    "ExportCheckpointManager": "exporting.manager",
    "HookedLoop": "session",
    "LoadStatus": "checkpoint",
    "LooperThread": "coordinator.threads",
    "PendingSave": "saving",
    "PerRank": "checkpoint",
    "RandomState": "checkpoint",
    "Scaffold": "hooks",
    "SecondOrStepTimer": "hooks",
    "SessionRunArgs": "hooks",
    "SessionRunContext": "hooks",
    "SessionRunHook": "hooks",
    "SessionRunValues": "hooks",
    "TrainingSession": "session",
    "checkpoint_exists": "loading",
    "checkpoints_iterator": "watching",
    "current_session": "hooks",
    "do_quantize_training": "quantizing",
    "export_number": "exporting.listing",
    "exports_iterator": "exporting.listing",
    "generate_checkpoint_state_proto": "state_file",
    "get_checkpoint_mtimes": "loading",
    "get_checkpoint_state": "state_file",
    "latest_checkpoint": "loading",
    "latest_export": "exporting.listing",
    "list_exports": "exporting.listing",
    "load": "loading",
    "open": "loading",
    "update_checkpoint_state": "state_file",
    "wait_for_new_checkpoint": "watching",
    "wait_for_new_export": "exporting.listing",
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
