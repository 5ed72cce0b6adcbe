"""Is Ray: the only place where the coordinator knows of it."""

import os
import random
import sys

from distckpt.coordinator.ray.process import process_kept

with process_kept():
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it would replace the user's until it is put back
    import ray  # noqa: F401

# It draws its ids from Python's random numbers, which are the training's, and the same on all ranks if seeded so.
sys.modules["ray._raylet"].random = random.SystemRandom()  # type: ignore[attr-defined]
