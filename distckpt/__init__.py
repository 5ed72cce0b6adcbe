"""Distributed, sharded, fault-tolerant checkpoints for PyTorch training on many machines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from distckpt.checkpoint import Checkpoint as Checkpoint
    from distckpt.checkpoint import LoadStatus as LoadStatus
    from distckpt.checkpoint import PerRank as PerRank
    from distckpt.checkpoint import RandomState as RandomState
    from distckpt.evaluation.watch import Watch as Watch
    from distckpt.evaluation.watch import watch as watch
    from distckpt.evaluation.watched import WatchedCheckpoint as WatchedCheckpoint
    from distckpt.export.listing import export_number as export_number
    from distckpt.export.listing import exports_iterator as exports_iterator
    from distckpt.export.listing import latest_export as latest_export
    from distckpt.export.listing import list_exports as list_exports
    from distckpt.export.listing import wait_for_new_export as wait_for_new_export
    from distckpt.export.manager import ExportCheckpointManager as ExportCheckpointManager
    from distckpt.export.recipes import Export as Export
    from distckpt.foreign.reader import ForeignReader as ForeignReader
    from distckpt.foreign.reader import read_foreign as read_foreign
    from distckpt.iterators import checkpoints_iterator as checkpoints_iterator
    from distckpt.iterators import wait_for_new_checkpoint as wait_for_new_checkpoint
    from distckpt.keep import AnyOf as AnyOf
    from distckpt.keep import BestN as BestN
    from distckpt.keep import EveryHours as EveryHours
    from distckpt.keep import EveryNumbers as EveryNumbers
    from distckpt.keep import LatestN as LatestN
    from distckpt.manager import CheckpointManager as CheckpointManager
    from distckpt.rank.costs import ManagerStats as ManagerStats
    from distckpt.rank.pending import PendingSave as PendingSave
    from distckpt.reader import CheckpointReader as CheckpointReader
    from distckpt.reader import checkpoint_exists as checkpoint_exists
    from distckpt.reader import get_checkpoint_mtimes as get_checkpoint_mtimes
    from distckpt.reader import latest_checkpoint as latest_checkpoint
    from distckpt.reader import list_variables as list_variables
    from distckpt.reader import load as load
    from distckpt.reader import load_variable as load_variable
    from distckpt.reader import open as open
    from distckpt.state_file import CheckpointState as CheckpointState
    from distckpt.state_file import generate_checkpoint_state_proto as generate_checkpoint_state_proto
    from distckpt.state_file import get_checkpoint_state as get_checkpoint_state
    from distckpt.state_file import update_checkpoint_state as update_checkpoint_state
    from distckpt.threads.coordinator import Coordinator as Coordinator
    from distckpt.threads.looper import LooperThread as LooperThread
    from distckpt.training.agreement import Agreement as Agreement
    from distckpt.training.hooks import CheckpointSaverHook as CheckpointSaverHook
    from distckpt.training.hooks import CheckpointSaverListener as CheckpointSaverListener
    from distckpt.training.hooks import Scaffold as Scaffold
    from distckpt.training.hooks import SecondOrStepTimer as SecondOrStepTimer
    from distckpt.training.hooks import SessionRunArgs as SessionRunArgs
    from distckpt.training.hooks import SessionRunContext as SessionRunContext
    from distckpt.training.hooks import SessionRunHook as SessionRunHook
    from distckpt.training.hooks import SessionRunValues as SessionRunValues
    from distckpt.training.hooks import current_session as current_session
    from distckpt.training.quantization import do_quantize_training as do_quantize_training
    from distckpt.training.quantization import do_quantize_training_on_graphdef as do_quantize_training_on_graphdef
    from distckpt.training.session import HookedLoop as HookedLoop
    from distckpt.training.session import TrainingSession as TrainingSession
    from distckpt.training.stop_at_step import StopAtStepHook as StopAtStepHook

# Looked up when first used: reading a log or running the coordinator needs no torch, and torch takes seconds to import.
_HOMES = {
    "Agreement": "training.agreement",
    "AnyOf": "keep",
    "BestN": "keep",
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager",
    "CheckpointReader": "reader",
    "CheckpointSaverHook": "training.hooks",
    "CheckpointSaverListener": "training.hooks",
    "CheckpointState": "state_file",
    "Coordinator": "threads.coordinator",
    "EveryHours": "keep",
    "EveryNumbers": "keep",
    "Export": "export.recipes",
    "ExportCheckpointManager": "export.manager",
    "ForeignReader": "foreign.reader",
    "HookedLoop": "training.session",
    "LatestN": "keep",
    "LoadStatus": "checkpoint",
    "LooperThread": "threads.looper",
    "ManagerStats": "rank.costs",
    "PendingSave": "rank.pending",
    "PerRank": "checkpoint",
    "RandomState": "checkpoint",
    "Scaffold": "training.hooks",
    "SecondOrStepTimer": "training.hooks",
    "SessionRunArgs": "training.hooks",
    "SessionRunContext": "training.hooks",
    "SessionRunHook": "training.hooks",
    "SessionRunValues": "training.hooks",
    "StopAtStepHook": "training.stop_at_step",
    "TrainingSession": "training.session",
    "Watch": "evaluation.watch",
    "WatchedCheckpoint": "evaluation.watched",
    "checkpoint_exists": "reader",
    "checkpoints_iterator": "iterators",
    "current_session": "training.hooks",
    "do_quantize_training": "training.quantization",
    "do_quantize_training_on_graphdef": "training.quantization",
    "export_number": "export.listing",
    "exports_iterator": "export.listing",
    "generate_checkpoint_state_proto": "state_file",
    "get_checkpoint_mtimes": "reader",
    "get_checkpoint_state": "state_file",
    "latest_checkpoint": "reader",
    "latest_export": "export.listing",
    "list_exports": "export.listing",
    "list_variables": "reader",
    "load": "reader",
    "load_variable": "reader",
    "open": "reader",
    "read_foreign": "foreign.reader",
    "update_checkpoint_state": "state_file",
    "wait_for_new_checkpoint": "iterators",
    "wait_for_new_export": "export.listing",
    "watch": "evaluation.watch",
}

_NAMES = sorted([*_HOMES, "__version__", "errors"])

__all__ = [name for name in _NAMES if name != "open"]  # a * import leaves Python's own


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"distckpt.{_HOMES[name]}"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("distckpt")
    if name in ("dcp", "errors", "ray"):  # not among __all__, so that a * import leaves the names dcp and ray to others
        return importlib.import_module(f"distckpt.{name}")
    raise AttributeError(f"module 'distckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(_NAMES)
