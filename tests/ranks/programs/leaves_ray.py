"""A script that shuts Ray down while an export that never ends is under way, and closes no manager."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import ray

import distckpt
from tests.ranks.export import blocks, inputs, tower


def main(folder: Path, address: str) -> None:
    """Save once, and leave when the export has begun."""
    ray.init(address=address, namespace="distckpt", log_to_driver=False)
    blocked = folder / "blocked"
    how = {"tower": distckpt.Export(functools.partial(blocks, str(blocked)), example_inputs=inputs())}
    manager = distckpt.ExportCheckpointManager(distckpt.Checkpoint(model=tower(1)), folder / "run", 1, how)
    manager.save(1).result(30)
    while not blocked.exists():
        time.sleep(0.05)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
