"""One rank fails, and all ranks stop within a second and say which rank it was, where, and why.

    python examples/cluster_stop.py
    torchrun --nproc-per-node 2 examples/cluster_stop.py

A background thread of every rank reads data while the main thread trains. On the last rank the reader meets a bad
record. Nobody waits for a collective that will never come: the main threads see the stop before their next step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import queue
import tempfile
import time

import torch
import torch.distributed as dist

import distckpt

BAD_RECORD = 50


def main(directory: str | None) -> None:
    """Train until somebody fails."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weights = torch.zeros(1000)
    with distckpt.CheckpointManager(distckpt.Checkpoint(weights=weights), directory or shared_folder()) as manager:
        coord = distckpt.Coordinator(cluster=manager.cluster, silence_timeout=30)
        records: queue.Queue[int] = queue.Queue(maxsize=10)
        numbers = itertools.count()

        def read() -> None:
            number = next(numbers)
            if number == BAD_RECORD and rank == size - 1:
                raise ValueError(f"record {number} cannot be read at {time.time():.3f}")
            records.put(number, timeout=30)

        distckpt.LooperThread.loop(coord, 0.01, read, name="reader")
        while not coord.should_stop():
            with contextlib.suppress(queue.Empty):
                weights += records.get(timeout=0.1)  # the training step
        stopped = time.time()
        try:
            coord.join()
        except distckpt.errors.PeerFailedError as error:
            after = stopped - float(error.reason.rpartition(" ")[2])
            print(f"rank {rank}: stopped after {after:.3f} s, because {error}", flush=True)
        except ValueError as error:
            print(f"rank {rank}: stopped, because of its own ValueError: {error}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def shared_folder() -> str:
    """A new folder, the same on all ranks of this host."""
    names = [tempfile.mkdtemp(prefix="distckpt-")]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    return names[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="a folder that all ranks see; a temporary one by default")
    main(parser.parse_args().directory)
