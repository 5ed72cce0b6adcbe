"""Rank functions that look at their own process before and after it has saved with others."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import distckpt
from distckpt.coordinator.ray.process import apart
from distckpt.export.packing import pack
from tests.support.process import adorn, belongings, changes


def kept(directory: str, look: Callable[[], object] = int, **options: Any) -> list[str]:
    """Save with a manager; what that has changed in the process, which had been made the user's own.

    ``look`` is called before the manager is closed.
    """
    adorn()
    before = belongings()
    with distckpt.CheckpointManager(distckpt.Checkpoint(state={"a": torch.zeros(3)}), directory, **options) as manager:
        manager.restore_or_initialize()
        manager.save(1).result(60)
        pack(say)  # as exports do, in Ray's way, though there may be no Ray
        after = belongings()
        look()
    return changes(before, after) + changes(before, belongings())


def kept_by_number(directory: str, run_id: str) -> list[str]:
    """As ``kept``, by ranks that leave torch.distributed before."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()
    return kept(directory, rank=rank, world_size=size, run_id=run_id)


def handler_set_meanwhile(address: str) -> list[int]:
    """Which SIGTERMs a handler hears that is set after the joining has begun, before Ray sets its own in C."""
    import ray
    from ray._private import ray_constants

    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = False  # as it is where Ray was imported before distckpt
    begun, go_on, heard = threading.Event(), threading.Event(), []

    def join() -> None:
        begun.set()
        go_on.wait()
        ray.init(address=address, namespace="distckpt", log_to_driver=False)

    joining = threading.Thread(target=apart, args=(join,))
    joining.start()
    begun.wait()
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    go_on.set()
    joining.join()
    os.kill(os.getpid(), signal.SIGTERM)
    return heard


def spawned(rank: int, directory: str, meeting: str) -> None:
    """What a process of ``torch.multiprocessing.spawn`` runs, which has imported Ray in its own way."""
    import ray  # noqa: F401

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    say(kept(directory))
    torch.distributed.destroy_process_group()


def coordinators_niceness(directory: str) -> int:
    """Of the process in which the actor lives."""
    import ray

    from distckpt.coordinator.ray.actor import actor_name
    from distckpt.coordinator.ray.detached import NAMESPACE

    actor = ray.get_actor(actor_name(directory), namespace=NAMESPACE)
    return os.getpriority(os.PRIO_PROCESS, int(ray.get(actor.describe.remote())[1]))


def say(found: Sequence[object]) -> None:
    """Tell the test, in one piece, since the ranks share the pipe."""
    os.write(1, f"{json.dumps(found)}\n".encode())


def main(launcher: str, directory: str, meeting: str) -> None:
    """Be the program that ``launcher`` starts."""
    if launcher == "spawn":
        torch.multiprocessing.spawn(spawned, (directory, meeting), nprocs=2)
        return
    seen: list[int] = []
    if launcher == "torchrun":
        torch.distributed.init_process_group("gloo")
        say(kept(directory, lambda: seen.append(coordinators_niceness(directory))))
        say(seen)
    else:
        say(kept(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
