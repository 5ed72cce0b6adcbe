"""A training script as users write it, for torchrun: saves, and says what it did in one line of JSON a rank."""

from __future__ import annotations

import json
import os
import sys

import torch

import distckpt


def main(directory: str) -> None:
    """Save twice, and leave torch.distributed alone."""
    state = {"weight": torch.arange(8.0), "step": 0}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=60) as manager:
        before = manager.restore_or_initialize()
        for number in (1, 2):
            state["step"] = number
            manager.save(number)
    said = json.dumps({"before": before, "latest": distckpt.latest_checkpoint(directory)})
    os.write(1, f"{said}\n".encode())  # in one piece, since the ranks share the pipe


if __name__ == "__main__":
    main(sys.argv[1])
