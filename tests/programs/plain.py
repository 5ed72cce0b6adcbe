"""A training script as users write it, for torchrun: saves, and says what it did in one line of JSON a rank."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

import distckpt


def main(directory: str, group: str) -> None:
    """Save twice; ``group`` is "gloo", or "none" to leave torch.distributed alone."""
    if group == "gloo":
        dist.init_process_group("gloo")
    state = {"weight": torch.arange(8.0), "step": 0}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=60) as manager:
        before = manager.restore_or_initialize()
        for number in (1, 2):
            state["step"] = number
            manager.save(number)
    said = json.dumps({"before": before, "latest": distckpt.latest_checkpoint(directory)})
    os.write(1, f"{said}\n".encode())  # in one piece, since the ranks share the pipe
    if group == "gloo":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
