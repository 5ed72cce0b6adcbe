"""Saves and restores of what lies on a GPU: how long training stands still, and how much slower its steps become.

One rank with one GPU, 3 GB of parameters and AdamW's state in memory of the host, so that no disk takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import distckpt

WIDTH, LAYERS = 4096, 16
BATCH = 8192
BARE = "bare copy to pinned memory"
STEPS = 8
"""So many are timed together: the first of them begins right after a save."""


class Training:
    """A perceptron, its AdamW, and a step that keeps a GPU busy for tens of milliseconds."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device="cuda") for _ in range(LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch = torch.randn(BATCH, WIDTH, device="cuda")
        self.step()

    def step(self) -> None:
        """One step, queued."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self) -> float:
        """Seconds that some take, to their end on the GPU."""
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """As torch gives it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def measure(folder: str, repetitions: int) -> dict[str, Any]:
    """All of it, in rounds. ``bytes`` is what a checkpoint holds; all else is seconds, one a round."""
    root, training = Path(folder), Training()
    tensors = [value for value in _tensors(training.state()) if value.is_cuda]
    nbytes = sum(value.nbytes for value in tensors)
    pinned = [torch.empty_like(value, device="cpu").pin_memory() for value in tensors]
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    checkpoint = distckpt.Checkpoint(model=training.model, optimizer=training.optimizer)
    with distckpt.CheckpointManager(checkpoint, root / "distckpt", max_to_keep=1) as manager:
        manager.prepare()
        manager.save(0).result()
        for number in range(1, repetitions + 1):
            note("steps alone", training.steps())
            note(BARE, _timed(lambda: _copy(tensors, pinned)))

            began = time.perf_counter()
            pending = manager.save(number)
            note("stall of a save", time.perf_counter() - began)
            note("steps after a save", training.steps())
            pending.result()
            note("save to its commit", time.perf_counter() - began)

            note("restore", _timed(manager.restore))
            path = root / "torch.pt"
            note("torch.save", _timed(lambda path=path: torch.save(training.state(), path)))  # type: ignore[misc]
            note("torch.load", _timed(lambda path=path: _load(training, path)))  # type: ignore[misc]
            path.unlink()
            note(
                "dcp.save",
                _timed(lambda at=number: dcp.save(training.state(), checkpoint_id=root / f"dcp-{at}", no_dist=True)),
            )  # type: ignore[misc]
            note("dcp.load", _timed(lambda at=number: _dcp_load(training, root / f"dcp-{at}")))  # type: ignore[misc]
            note("copy to memory that is not pinned", _timed(lambda: _copied(training)))
        stats = manager.stats()
    waited = stats.device_waited
    return {
        "bytes": nbytes,
        "measured": found,
        "optimizer's step waited": [waited.total / waited.times if waited.times else 0.0],
    }


def _timed(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _copy(tensors: list[torch.Tensor], pinned: list[torch.Tensor]) -> None:
    for source, target in zip(tensors, pinned, strict=True):
        target.copy_(source, non_blocking=True)


def _load(training: Training, path: Path) -> None:
    state = torch.load(path, map_location="cuda", mmap=True, weights_only=True)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])


def _dcp_load(training: Training, path: Path) -> None:
    state = training.state()
    dcp.load(state, checkpoint_id=path, no_dist=True)  # type: ignore[attr-defined]
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])


def _copied(training: Training) -> None:
    for value in _tensors(training.state()):
        value.cpu()


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for value in values for tensor in _tensors(value)]
