"""What ranks do in the tests of the cluster's stops. Every function runs on all ranks of a gang."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt import Coordinator, LooperThread
from distckpt.errors import DistckptError, OutOfRangeError


class OddError(OutOfRangeError):
    """Defined in a test, so known to other ranks by its name only."""


ERRORS = {"value": ValueError, "key": KeyError, "odd": OddError, "exit": SystemExit}

_held: dict[str, Any] = {}


def begin(directory: str, silence_timeout: float = 60.0) -> dict[str, Any]:
    """Make a manager and a Coordinator of its cluster, and a thread that runs until there is a stop."""
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(state={"a": torch.ones(2)}), directory, save_timeout=40)
    _held["manager"] = manager
    return renew(silence_timeout)


def renew(silence_timeout: float = 60.0) -> dict[str, Any]:
    """Drop the Coordinator, if there is one, and make another."""
    _held.pop("coord", None)
    _held["coord"] = Coordinator(cluster=_held["manager"].cluster, silence_timeout=silence_timeout)
    _work()
    dist.barrier()
    return {"pid": os.getpid()}


def _work() -> None:
    _held["looper"] = LooperThread.loop(_held["coord"], 0.01, int, name="working")


def stop(rank: int, error: str = "", wait: float = 30.0) -> dict[str, Any]:
    """One rank asks for a stop, because of an error if one is named; all wait for it. When each saw it."""
    coord = _held["coord"]
    before = coord.should_stop()
    dist.barrier()
    if dist.get_rank() == rank:
        with coord.stop_on_exception():
            _fail(error)
            coord.request_stop()
    return {"before": before, "stopped": coord.wait_for_stop(wait), "at": time.monotonic()}


def _fail(error: str) -> None:
    if error:
        raise ERRORS[error](f"of rank {dist.get_rank()}")


def stop_everywhere(first: int) -> dict[str, Any]:
    """Every rank has an error of its own; that of one is heard before the others can report theirs."""
    coord, rank = _held["coord"], dist.get_rank()
    if rank == first:
        coord.request_stop(ValueError(f"of rank {rank}"))
        assert coord._membership.settle(30)
        dist.barrier()
        return join()
    own = KeyError(f"of rank {rank}")
    with coord._lock:  # what it hears waits until this block ends
        dist.barrier()
        coord.request_stop(own)
    result = join()
    return {**result, "context": coord._error.__context__ is own}


def join() -> dict[str, Any]:
    """What join raises, twice."""
    coord = _held["coord"]
    found = []
    for _ in range(2):
        try:
            coord.join(stop_grace_period_secs=20)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is what the test looks at
            found.append(error)
    if not found:
        return {"raised": ""}
    assert found[0] is found[1]
    error = found[0]
    fields = {key: value for key, value in vars(error).items() if isinstance(value, str | int | float)}
    return {"raised": type(error).__name__, "text": str(error), **fields}


def clear() -> dict[str, Any]:
    """Start anew."""
    coord = _held["coord"]
    coord.clear_stop()
    _work()
    dist.barrier()
    return {"stopped": coord.should_stop(), "joined": coord.joined}


def report_late(rank: int) -> dict[str, Any]:
    """After all have started anew one rank's report of before arrives once more."""
    coord = _held["coord"]
    old = coord._membership
    coord.clear_stop()
    dist.barrier()
    if dist.get_rank() == rank:
        old._settled.clear()
        old.report(ValueError("from before"))
        assert old.settle(30)
    dist.barrier()
    return {"stopped": coord.wait_for_stop(0.3)}


def silent(rank: int, seconds: float) -> dict[str, Any]:
    """One rank is killed; the others wait until they are told."""
    coord = _held["coord"]
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    return {"stopped": coord.wait_for_stop(seconds), "after": time.monotonic() - began}


def leave(rank: int, seconds: float) -> dict[str, Any]:
    """One rank closes its manager and goes on; whether the others take that for a stop."""
    if dist.get_rank() == rank:
        _held.pop("manager").close()
        _held["coord"].request_stop()
        return {"stopped": False}
    return {"stopped": _held["coord"].wait_for_stop(seconds)}


def fail_in_the_manager(rank: int) -> dict[str, Any]:
    """An error leaves the manager's with-block on one rank."""
    if dist.get_rank() == rank:
        with contextlib.suppress(ValueError), _held["manager"]:
            raise ValueError("in the loop")
        return join()
    stopped = _held["coord"].wait_for_stop(30)
    return {"stopped": stopped, **join()}


def latencies(count: int) -> dict[str, Any]:
    """Rank 0 asks for a stop; the others see it; again and again. Milliseconds on one host's clock."""
    coord, seen = _held["coord"], []
    for _ in range(count):
        dist.barrier()
        time.sleep(0.02)
        asked = torch.zeros(1, dtype=torch.float64)
        if dist.get_rank() == 0:
            asked[0] = time.monotonic()
            coord.request_stop()
        assert coord.wait_for_stop(30)
        at = time.monotonic()
        dist.broadcast(asked, 0)
        seen.append((at - asked.item()) * 1000)
        coord.join()
        coord.clear_stop()
    return {"median": statistics.median(seen), "worst": max(seen)}


def end() -> None:
    """Let everything go."""
    coord, manager = _held.pop("coord"), _held.pop("manager", None)
    coord.request_stop()
    if manager is not None:
        try:
            manager.close()
        except DistckptError:
            return  # a newer run has started meanwhile, or the test has killed what it needs
