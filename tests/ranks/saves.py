"""What rank processes do in tests. Every function runs on all ranks of a gang; arguments and results are JSON."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distckpt
from tests.support.models import make_model, train


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of a parallelism and its AdamW: "one", "ddp", "fsdp", "hsdp", "tp", "fsdp_tp" or "stages"."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = make_model(seed, depth=4 if kind == "stages" else 2)
    if kind == "stages":
        each = 4 // size
        model = nn.ModuleDict({str(at): model[at] for at in range(rank * each, (rank + 1) * each)})
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind != "one":
        shape = {"fsdp": (size,), "hsdp": (2, size // 2), "tp": (size,), "fsdp_tp": (2, size // 2)}[kind]
        names = {"fsdp": ("shard",), "hsdp": ("copy", "shard"), "tp": ("tp",), "fsdp_tp": ("shard", "tp")}[kind]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        if "tp" in names:
            for block in model:
                parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if "shard" in names:
            data = mesh if kind in ("fsdp", "hsdp") else mesh["shard"]
            for block in model:
                fully_shard(block, mesh=data)
            fully_shard(model, mesh=data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, optimizer


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Change every parameter and every optimizer state, deterministically."""
    if isinstance(model, nn.ModuleDict):
        for block in model.values():
            inner = torch.optim.SGD(block.parameters(), lr=0.0)
            train(block, inner, 1)
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        return
    train(model, optimizer, steps)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 of every whole tensor, by key."""
    found: dict[str, str] = {}

    def visit(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, child in value.items():
                visit(f"{key}.{name}", child)
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            data = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[key] = hashlib.sha256(data).hexdigest()

    visit("model", get_model_state_dict(model))
    visit("optimizer", get_optimizer_state_dict(model, optimizer)["state"])
    return found


def save(directory: str, kind: str, number: int = 1, steps: int = 2, **options: Any) -> dict[str, Any]:
    """Train, save and wait."""
    model, optimizer = build(kind, seed=0)
    run_steps(model, optimizer, steps)
    cursor = {"position": 100 + dist.get_rank()}
    checkpoint = distckpt.Checkpoint(
        model=model, optimizer=optimizer, cursor=distckpt.PerRank(cursor, on_resize="drop")
    )
    with distckpt.CheckpointManager(checkpoint, directory, **options) as manager:
        path = manager.save(number).result(30)
    return {"path": path, "digest": digest(model, optimizer)}


def save_where_it_is_full(directory: str, filler: str) -> str:
    """Save twice; before the second time ``filler`` leaves room for one rank's shard and half of another's."""
    checkpoint = distckpt.Checkpoint(own=distckpt.PerRank({"tensor": torch.ones(1 << 18)}))
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        manager.save(2).result(30)
        if dist.get_rank() == 0:
            disk = os.statvfs(directory)
            Path(filler).parent.mkdir(parents=True, exist_ok=True)  # what was there is garbage, and gone by now
            Path(filler).write_bytes(bytes(disk.f_bavail * disk.f_bsize - (3 << 19)))
        dist.barrier()
        return str(manager.save(3).result(30))


def restore(directory: str, kind: str, which: int | None = None) -> dict[str, Any]:
    """Restore into a model of other values."""
    model, optimizer = build(kind, seed=7)
    run_steps(model, optimizer, 1)
    cursor = {"position": -1}
    checkpoint = distckpt.Checkpoint(
        model=model, optimizer=optimizer, cursor=distckpt.PerRank(cursor, on_resize="drop")
    )
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        path = manager.restore(which)
    return {"path": path, "digest": digest(model, optimizer), "cursor": cursor["position"]}


def many_saves(directory: str, kind: str, count: int, **options: Any) -> dict[str, Any]:
    """Save again and again from one manager, with no wait between; what storage says afterwards."""
    model, optimizer = build(kind, seed=0)
    extra = {"step": 0}
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, extra=extra)
    digests = {}
    with distckpt.CheckpointManager(checkpoint, directory, **options) as manager:
        manager.prepare()
        pending = []
        for step in range(1, count + 1):
            run_steps(model, optimizer, 1)
            extra["step"] = step
            pending.append(manager.save(step))
            digests[step] = digest(model, optimizer)
        paths = [one.result(30) if one is not None else None for one in pending]
        return {"paths": paths, "checkpoints": manager.checkpoints, "digests": digests}


def save_different_numbers(directory: str) -> dict[str, Any]:
    """Every rank saves a number of its own; then all save the same.

    Who is told while another rank has yet to come, and goes on at once, is a rank that saves another number than that one.
    """
    checkpoint = distckpt.Checkpoint(state={"a": torch.ones(3)})
    with distckpt.CheckpointManager(checkpoint, directory, save_timeout=5) as manager:
        error = manager.save(10 + dist.get_rank()).exception(30)
        dist.barrier()
        path = manager.save(20).result(30)
    return {"error": f"{type(error).__name__}: {error}", "path": path}


def one_rank_stays_away(directory: str, absent: int, timeout: float) -> dict[str, Any]:
    """All ranks but one save 2; then all save 3."""
    state = {"a": torch.ones(3)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=timeout) as manager:
        first = manager.save(1).result(30)
        began = time.monotonic()
        error = None
        if dist.get_rank() != absent:
            error = manager.save(2).exception(30)
        waited = time.monotonic() - began
        dist.barrier()
        if dist.get_rank() == absent:
            # The others have given that save up. Its own fails as soon as they go on to the next one.
            late = manager.save(2).exception(30)
            assert late is not None
        last = manager.save(3).result(30)
    return {"first": first, "error": f"{type(error).__name__}: {error}", "waited": waited, "last": last}


def hold(directory: str, **options: Any) -> dict[str, Any]:
    """Save once and keep the manager open for the steps that follow."""
    state = {"a": torch.ones(4), "rank": 0}
    checkpoint = distckpt.Checkpoint(state=state)
    manager = distckpt.CheckpointManager(checkpoint, directory, **options)
    _HELD["manager"] = manager
    return {"path": manager.save(1).result(30), "pid": os.getpid()}


def held_save(number: int) -> dict[str, Any]:
    """Save with the manager that ``hold`` made; the error as text if it fails."""
    try:
        pending = _HELD["manager"].save(number)
        return {"path": pending.result(45), "error": ""}
    except distckpt.errors.DistckptError as error:
        return {"path": "", "error": f"{type(error).__name__}: {error}"}


def release() -> None:
    """Close the manager that ``hold`` made."""
    try:
        _HELD.pop("manager").close()
    except distckpt.errors.DistckptError:
        return  # the tests that make it fail have looked at the failure already


_HELD: dict[str, distckpt.CheckpointManager] = {}


def disagree(directory: str) -> dict[str, Any]:
    """Ranks hold another shape, then different values under one key; each is refused by name."""
    rank = dist.get_rank()
    errors = []
    for number, state in enumerate(({"a": torch.ones(3 + rank)}, {"a": torch.ones(3), "b": rank}), 1):
        with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, save_timeout=15) as manager:
            error = manager.save(number).exception(30)
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors}


def drift(directory: str, check_copies: bool) -> dict[str, Any]:
    """Copies that were equal at the first save, and are not at the second."""
    weights = torch.ones(3)
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(state={"weights": weights}), directory, save_timeout=15, check_copies=check_copies
    ) as manager:
        manager.save(1).result(30)
        weights += dist.get_rank()
        error = manager.save(2).exception(30)
    return {"error": f"{type(error).__name__}: {error}"}


def buffers_of_ddp(directory: str) -> dict[str, Any]:
    """BatchNorm under DDP: each rank has seen other data, and rank 0's buffers are everyone's after a restore."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.BatchNorm1d(64) for _ in range(8)]), broadcast_buffers=False
    )
    torch.manual_seed(1 + dist.get_rank())
    model(torch.randn(16, 64)).sum().backward()
    own = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), directory, save_timeout=15) as manager:
        manager.save(1).result(30)
        manager.restore(1)
    return {"own": own, "restored": {name: buffer.tolist() for name, buffer in model.named_buffers()}}


def save_once(prefix: str) -> str:
    """Save without a manager."""
    checkpoint = distckpt.Checkpoint(a=torch.ones(8), own=distckpt.PerRank(dist.get_rank()))
    return checkpoint.save(prefix)
