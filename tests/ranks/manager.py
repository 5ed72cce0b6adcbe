"""Rank functions that call a manager's methods one after another, as a training loop does."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DistckptError, StorageError
from distckpt.storage import LocalStore, ObjectInfo
from distckpt.world import find_world
from tests.support.small_runs import until
from tests.support.swapped import write_to


def save_on_after_a_failure(directory: str, fails_at: int, steps: int, interval: int | None, heard: bool) -> list[str]:
    """Save at every step, which rank 1 cannot do at ``fails_at``; what came of each call.

    ``heard``: rank 0 hears of the failure before its next save, else later.
    """
    mine: dict[str, Any] = {}
    rank = dist.get_rank()
    outcomes = []
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(mine=distckpt.PerRank(mine)),
        directory,
        max_to_keep=None,
        step_counter=lambda: mine["step"],
        checkpoint_interval=interval,
        save_timeout=20,
    ) as manager:
        for step in range(1, steps + 1):
            mine["step"] = step
            mine["data"] = object() if (step, rank) == (fails_at, 1) else 0
            try:
                pending = manager.save()
            except DistckptError as error:
                outcomes.append(type(error).__name__)
                continue
            outcomes.append("begun" if pending is not None else "nothing")
            while heard and pending is not None and (step, rank) == (fails_at, 0) and not pending.done():
                time.sleep(0.01)
    return outcomes


class Unwritable(LocalStore):
    """No shard can be written."""

    def put_unique(self, path: str, size: int, sections: object) -> ObjectInfo:
        raise StorageError(path, "no")


def save_on_a_bad_store(directory: str, fails_at: int, allowed: int) -> list[str]:
    """Save four times, which rank 1 cannot write once; what came of each call, after which all wait for the end of it."""
    mine: dict[str, Any] = {}
    outcomes = []
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(mine=distckpt.PerRank(mine)),
        directory,
        max_to_keep=None,
        save_failures_allowed=allowed,
        save_timeout=20,
    ) as manager:
        for step in range(1, 5):
            mine["step"] = step
            write_to(manager, Unwritable(directory) if (step, dist.get_rank()) == (fails_at, 1) else None)
            try:
                manager.save(step)
                outcomes.append("begun")
            except DistckptError:
                outcomes.append("raised")
            until(lambda: all(pending.done() for pending in manager._pending))
            dist.barrier()
    return outcomes


def two_managers(directory: str, run_id: str) -> list[float]:
    """One manager after the other in one incarnation of the job: the second restores, and saves, like the first."""
    state = {"weight": torch.full((4,), 7.0)}
    world = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "run_id": run_id}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=30, **world) as manager:
        manager.restore_or_initialize()
        manager.save(1)
        manager.wait()
        manager.restore()
    state["weight"].zero_()
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=30, **world) as manager:
        manager.restore()
        manager.save(2)
    return state["weight"].tolist()


class Stubborn:
    """Has a state that cannot be put back on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        """Something."""
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse it on rank 1."""
        if dist.get_rank() == 1:
            raise ValueError("cannot be put back")


def one_cannot_restore(directory: str) -> str:
    """An object of rank 1 does not take its state back; how the restore ends."""
    checkpoint = distckpt.Checkpoint(weight=torch.ones(4), stubborn=Stubborn())
    with distckpt.CheckpointManager(checkpoint, directory, save_timeout=30) as manager:
        manager.save(1)
        manager.wait()
        try:
            manager.restore()
        except (DistckptError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def restored_meanwhile(directory: str) -> dict[str, Any]:
    """What a restore gives while Ray does not answer."""
    state = {"weight": torch.zeros(4)}
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory)
    path = manager.restore_or_initialize()
    return {"path": path, "weight": state["weight"].tolist(), "opened": manager._client._first.done()}


def without_ray(directory: str, by_number: bool) -> dict[str, str]:
    """How making a manager fails where there is no Ray at the address that the environment names."""
    import ray

    ray._private.ray_constants.NUM_REDIS_GET_RETRIES = 1  # else it tries for 20 s
    world: dict[str, Any] = {}
    if by_number:
        world = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "run_id": "job-1"}
        dist.destroy_process_group()
    try:
        with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), directory, **world) as manager:
            manager.save(1).result(60)
    except Exception as error:  # noqa: BLE001 - the test says which it is to be
        return {"kind": type(error).__name__, "text": str(error)}
    return {}


def consult() -> str:
    """What rank 0 answers, when each rank says its number, to all."""
    council = find_world().council
    assert council is not None
    return council.consult(str(dist.get_rank()), " ".join, 30)
