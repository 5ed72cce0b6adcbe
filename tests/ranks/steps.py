"""Rank functions in which ranks do not save alike, and go on together."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DistckptError
from distckpt.transfer.staging import Staging

TIMEOUT = 4.0


def ended(pending: distckpt.PendingSave | None) -> str:
    """How a save ended."""
    if pending is None:
        return "skipped"
    error = pending.exception(120)
    return f"{type(error).__name__}: {error}" if error is not None else "saved"


def save_alone(directory: str, who: int, numbers: list[int], buffers: int) -> dict[str, Any]:
    """All save 1; rank ``who`` saves 2 alone; all save ``numbers``, one after the other."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8), mine=distckpt.PerRank({"n": 0}))
    with distckpt.CheckpointManager(
        checkpoint, directory, max_to_keep=None, save_timeout=TIMEOUT, buffers=buffers
    ) as manager:
        outcomes = [ended(manager.save(1))]
        alone = ended(manager.save(2)) if dist.get_rank() == who else ""
        dist.barrier()
        outcomes += [ended(manager.save(number)) for number in numbers]
    return {"outcomes": outcomes, "alone": alone}


def save_with_metrics(directory: str) -> list[str]:
    """Each rank saves 1 with its own number as the loss, rank 0 with none that could be one the second time."""
    rank, outcomes = dist.get_rank(), []
    with distckpt.CheckpointManager(distckpt.Checkpoint(w=torch.ones(8)), directory, save_timeout=60) as manager:
        for number, loss in enumerate((rank, "low" if rank == 0 else 1, rank), 1):
            try:
                outcomes.append(ended(manager.save(number, metrics={"loss": loss})))  # type: ignore[dict-item]
            except TypeError as error:
                outcomes.append(f"TypeError: {error}".partition(",")[0])
    return outcomes


def go_on(directory: str) -> dict[str, Any]:
    """Rank 0 begins to save 2, which rank 1 leaves out: both save 3 then. How long rank 0 was held is told too."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8))
    with distckpt.CheckpointManager(checkpoint, directory, max_to_keep=None, save_timeout=60) as manager:
        outcomes = [ended(manager.save(1))]
        pending = manager.save(2) if dist.get_rank() == 0 else None
        dist.barrier()
        begin = time.monotonic()
        if dist.get_rank() == 1:
            outcomes.append(ended(manager.save(3)))
        else:
            alone = ended(pending)
            outcomes.append(ended(manager.save(3)))
    return {"outcomes": outcomes, "alone": alone if dist.get_rank() == 0 else "", "held": time.monotonic() - begin}


def different_numbers(directory: str) -> list[str]:
    """All save 1; then each rank another number; then all the same number, twice."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8))
    with distckpt.CheckpointManager(checkpoint, directory, max_to_keep=None, save_timeout=TIMEOUT) as manager:
        outcomes = [ended(manager.save(1)), ended(manager.save(10 + dist.get_rank()))]
        dist.barrier()
        outcomes += [ended(manager.save(20)), ended(manager.save(21))]
    return outcomes


def encode_error(directory: str) -> list[str]:
    """Rank 1 cannot store 2; then all save 3."""
    mine: dict[str, Any] = {"n": 0}
    outcomes = []
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(mine=distckpt.PerRank(mine)), directory, max_to_keep=None, save_timeout=60
    ) as manager:
        for number in (1, 2, 3):
            mine["n"] = object() if (number, dist.get_rank()) == (2, 1) else number
            try:
                outcomes.append(ended(manager.save(number)))
            except DistckptError as error:
                outcomes.append(type(error).__name__)
    return outcomes


def nested_save(directory: str) -> str:
    """A hook that runs while the state is collected saves too; what it is told."""
    heard: list[str] = []

    class Hooked:
        def state_dict(self) -> dict[str, int]:
            """Saves, of all things."""
            try:
                manager.save(7)
            except DistckptError as error:
                heard.append(f"{type(error).__name__}: {error}")
            return {"x": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            """Nothing."""

    with distckpt.CheckpointManager(distckpt.Checkpoint(hooked=Hooked()), directory, save_timeout=60) as manager:
        assert ended(manager.save(1)) == "saved"
    return heard[0]


def make_alone(directory: str, who: int) -> dict[str, Any]:
    """Rank ``who`` makes a manager alone; then all make one together, twice."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8))
    alone, waited = "", 0.0
    if dist.get_rank() == who:
        began = time.monotonic()
        try:
            distckpt.CheckpointManager(checkpoint, directory, save_timeout=3)
        except DistckptError as error:
            alone = f"{type(error).__name__}: {error}"
        waited = time.monotonic() - began
    dist.barrier()
    outcomes = []
    for number in (1, 2):
        with distckpt.CheckpointManager(checkpoint, directory, save_timeout=60) as manager:
            outcomes.append(ended(manager.save(number)))
    return {"alone": alone, "waited": waited, "outcomes": outcomes}


def interrupted(directory: str, moment: str) -> dict[str, Any]:
    """Rank 0 is interrupted while it saves 2, which is new to the coordinator; then all save 3."""
    state: dict[str, Any] = {"w": torch.ones(8)}
    checkpoint = distckpt.Checkpoint(state=state)
    with distckpt.CheckpointManager(checkpoint, directory, max_to_keep=None, save_timeout=600) as manager:
        outcomes = [ended(manager.save(1))]
        state["new"] = torch.ones(3)
        if dist.get_rank() == 0:
            outcomes.append(_interrupted_save(manager, 2, moment))
            dist.barrier()
        elif moment == "planning":
            dist.barrier()
            outcomes.append(ended(manager.save(2)))
        else:  # a plan needs both
            outcomes.append(ended(manager.save(2)))
            dist.barrier()
        dist.barrier()
        outcomes.append(ended(manager.save(3)))
    return {"outcomes": outcomes}


def _interrupted_save(manager: distckpt.CheckpointManager, number: int, moment: str) -> str:
    stage = Staging.stage
    if moment == "planning":  # which is as long as it takes, for the other rank has not come
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        Staging.stage = _interrupt  # type: ignore[method-assign]
    try:
        return ended(manager.save(number))
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        Staging.stage = stage  # type: ignore[method-assign]


def _interrupt(*_: object) -> Any:
    raise KeyboardInterrupt


def interrupted_restore(directory: str) -> dict[str, Any]:
    """Rank 0 is interrupted while it waits for rank 1 to restore; then all restore."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8))
    with distckpt.CheckpointManager(checkpoint, directory, save_timeout=600) as manager:
        outcomes = [ended(manager.save(1))]
        if dist.get_rank() == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            dist.barrier()
        try:
            outcomes.append(manager.restore())
        except KeyboardInterrupt:
            outcomes.append("interrupted")
        except DistckptError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        if dist.get_rank() == 0:
            dist.barrier()
        dist.barrier()
        outcomes.append(manager.restore())
    return {"outcomes": outcomes}


def call_alone(directory: str, what: str, who: int) -> dict[str, Any]:
    """Rank ``who`` calls what all ranks must call; then all of them do, and save."""
    checkpoint = distckpt.Checkpoint(w=torch.ones(8))
    alone, outcomes = "", []
    with distckpt.CheckpointManager(checkpoint, directory, save_timeout=2) as manager:
        outcomes.append(ended(manager.save(1)))
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: ended(manager.save(2)),
            "prepare": manager.prepare,
            "restore": manager.restore,
            "restore_or_initialize": manager.restore_or_initialize,
        }
        if dist.get_rank() == who:
            try:
                alone = str(calls[what]())
            except DistckptError as error:
                alone = f"{type(error).__name__}: {error}"
        dist.barrier()
        manager.prepare()
        manager.restore()
        outcomes.append(ended(manager.save(3)))
    return {"alone": alone, "outcomes": outcomes}


def restore_alone(directory: str, meeting: str, who: int, run_id: str | None) -> dict[str, Any]:
    """All save 1; rank ``who`` restores alone; then all restore, twice. With ``run_id`` they leave torch.distributed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    options: dict[str, Any] = {}
    if run_id is not None:
        dist.destroy_process_group()
        options = {"rank": rank, "world_size": size, "run_id": run_id}
    met = dist.FileStore(meeting, size)
    w = torch.ones(8)
    alone, outcomes = "", []
    with distckpt.CheckpointManager(distckpt.Checkpoint(w=w), directory, save_timeout=TIMEOUT, **options) as manager:
        outcomes.append(ended(manager.save(1)))
        if rank == who:
            try:
                manager.restore()
            except DistckptError as error:
                alone = f"{type(error).__name__}: {error}"
        met.set(f"{rank}", "")
        met.wait([f"{other}" for other in range(size)])
        for _ in range(2):
            w.zero_()
            manager.restore()
            outcomes.append("restored" if w.eq(1).all() else "not restored")
    return {"alone": alone, "outcomes": outcomes}
