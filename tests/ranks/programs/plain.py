"""A training script as users write it, for torchrun: saves, and says what it did in one line of JSON a rank."""

from __future__ import annotations

import json
import os
import sys

import ray
import torch
import torch.distributed as dist

import distckpt
from distckpt.coordinator.ray.actor import actor_name
from distckpt.coordinator.ray.detached import NAMESPACE


def coordinator_pid(directory: str) -> int:
    """The process in which the actor lives, for which the cluster that was started has left its priority alone."""
    actor = ray.get_actor(actor_name(directory), namespace=NAMESPACE)
    return int(ray.get(actor.describe.remote())[1])


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
        niceness = os.getpriority(os.PRIO_PROCESS, coordinator_pid(directory))
    said = json.dumps({"before": before, "latest": distckpt.latest_checkpoint(directory), "niceness": niceness})
    os.write(1, f"{said}\n".encode())  # in one piece, since the ranks share the pipe
    if group == "gloo":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
