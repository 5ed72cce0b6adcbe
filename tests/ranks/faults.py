"""Rank functions in which something dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.coordinator.messages import Restore
from distckpt.storage import LocalStore
from distckpt.transfer.staging import Staging
from tests.ranks.saves import _HELD, held_save
from tests.support.small_runs import until
from tests.support.swapped import write_to


def save_and_die(number: int, rank: int, moment: str) -> dict[str, Any]:
    """One rank is killed by SIGKILL at a moment of its own save; the others save."""
    if dist.get_rank() == rank:
        die_at(moment)
        _HELD["manager"].checkpoint.state["a"] += 1
    return held_save(number)


def leave_ray_in_a_save(number: int, rank: int) -> dict[str, Any]:
    """All shut Ray down, one rank while its save waits for those of the others."""
    import ray

    if dist.get_rank() != rank:
        ray.shutdown()
    manager = _HELD["manager"]
    pending = manager.save(number)
    if dist.get_rank() == rank:
        until(lambda: list(Path(manager.directory, f"ckpt-{number}").rglob("*.arrow")))
        time.sleep(0.5)  # now its receipt has gone out, and the answer is waited for
    began = time.monotonic()
    ray.shutdown()
    try:
        return {"error": "", "path": pending.result(60)}
    except distckpt.errors.DistckptError as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}


def fail_the_coordinator(number: int, rank: int) -> dict[str, Any]:
    """One rank asks what makes the coordinator's machine raise, while the other waits for it to save; then both save."""
    manager, heard = _HELD["manager"], ""
    if dist.get_rank() == rank:
        until(lambda: list(Path(manager.directory, f"ckpt-{number}").rglob("*.arrow")))
        time.sleep(0.5)  # now the other's receipt has gone out, and the answer is waited for
        try:
            manager._client.ask(Restore([], None), 30)  # type: ignore[arg-type]
        except distckpt.errors.DistckptError as error:
            heard = f"{type(error).__name__}: {error}"
    else:
        error = manager.save(number).exception(60)
        heard = f"{type(error).__name__}: {error}"
    dist.barrier()
    return {"heard": heard, **held_save(number + 1)}


def join_ray() -> None:
    """Connect to the tests' cluster again."""
    import ray

    ray.init(namespace="distckpt", log_to_driver=False)


def die_at(moment: str) -> None:
    """Have this process kill itself when it gets there."""

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "staging":
        Staging.stage = die  # type: ignore[method-assign]
        return
    put = LocalStore.put_unique

    def put_unique(self: LocalStore, path: str, size: int, sections: Any) -> Any:
        if moment == "writing":
            return put(self, path, size, (part if at else die() for at, part in enumerate(sections)))
        put(self, path, size, sections)
        return die()

    LocalStore.put_unique = put_unique  # type: ignore[method-assign]


def save_elsewhere(directory: str) -> dict[str, Any]:
    """Rank 1's files go to a folder that the coordinator does not see, as on a host with a disk of its own."""
    checkpoint = distckpt.Checkpoint(state={"a": torch.ones(3), "own": distckpt.PerRank({}).obj})
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(state=checkpoint.state, mine=distckpt.PerRank({"n": dist.get_rank()})),
        directory,
        save_timeout=15,
    ) as manager:
        if dist.get_rank() == 1:
            write_to(manager, LocalStore(f"{directory}-of-another-host"))
        error = manager.save(1).exception(30)
    return {"error": f"{type(error).__name__}: {error}"}
