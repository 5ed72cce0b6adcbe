"""Rank functions for ranks on hosts of their own."""

from __future__ import annotations

import socket
from typing import Any

import psutil
import torch

import distckpt


def host() -> dict[str, Any]:
    """This rank's host, and for every Ray node on it whether it waits for its cluster as long as training does."""
    raylets = [process for process in psutil.process_iter() if process.name() == "raylet"]
    waiting = ["RAY_gcs_rpc_server_reconnect_timeout_s" in process.environ() for process in raylets]
    return {"name": socket.gethostname(), "nodes_that_wait": waiting}


def save_error(directory: str) -> dict[str, str]:
    """How a save into a directory fails."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(state={"a": torch.arange(5.0)}), directory) as manager:
        error = manager.save(1).exception(30)
    return {"kind": type(error).__name__, "text": str(error)}
