"""Rank functions that save and load through torch.distributed.checkpoint. No Ray is here, and none is needed."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec, ShardMetadata
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import distckpt

warnings.filterwarnings("ignore", message="torch.distributed is")

_GROUPS: dict[int, Any] = {}


def group_of(size: int) -> Any:
    """The first ``size`` ranks as a process group; all ranks ask for it."""
    if size not in _GROUPS:
        _GROUPS[size] = dist.new_group(list(range(size)))
    return _GROUPS[size]


def network() -> nn.Sequential:
    """Small, and uneven for any number of ranks."""
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))


class Trained:
    """A network that ``size`` ranks share, and its optimizer after a step."""

    def __init__(self, seed: int, size: int, tensor_parallel: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = network()
        if tensor_parallel:
            mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("fsdp", "tp"))
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.model, mesh["tp"], plan)  # type: ignore[arg-type]
            fully_shard(self.model, mesh=mesh["fsdp"])
        elif size > 1:
            fully_shard(self.model, mesh=DeviceMesh.from_group(group_of(size), "cpu"))
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.1 * seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) * seed
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """As DCP's users have it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "progress": {"step": 1}}

    def take(self, state: dict[str, Any]) -> None:
        """Take it back."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def digest(self) -> str:
        """Of all there is, whoever holds it."""
        return digest_of(self.state())


def digest_of(state: Any) -> str:
    """The SHA-256 of a nested state, by its keys in order; DTensors whole."""
    found = hashlib.sha256()

    def visit(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                visit(f"{path}.{key}", value[key])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for at, item in enumerate(value):
                visit(f"{path}.{at}", item)
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.update(path.encode() + whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{path}={value!r}".encode())

    visit("", state)
    return found.hexdigest()


def train_and_save(directory: str, number: int, size: int, how: str = "save", seed: int = 1) -> str | None:
    """Have the first ``size`` ranks save; the digest of it, on those."""
    group = group_of(size)
    if dist.get_rank() >= size:
        return None
    trained = Trained(seed, size, tensor_parallel=how == "tp")
    options: dict[str, Any] = {"no_dist": True} if size == 1 else {"process_group": group}
    writer = distckpt.dcp.Writer(directory, number)
    if how == "async":
        dcp.async_save(trained.state(), storage_writer=writer, **options).result()  # type: ignore[union-attr]
    else:
        dcp.save(trained.state(), storage_writer=writer, **options)
    return trained.digest()


def load_and_digest(path: str, size: int, how: str = "dcp") -> str | None:
    """Have the first ``size`` ranks load into something else; the digest of that, on those."""
    group = group_of(size)
    if dist.get_rank() >= size:
        return None
    trained = Trained(7, size, tensor_parallel=how == "tp")
    if how == "ours":
        distckpt.Checkpoint(model=trained.model, optimizer=trained.optimizer, progress={"step": 0}).restore(path)
        return trained.digest()
    state = trained.state()
    options: dict[str, Any] = {"no_dist": True} if size == 1 else {"process_group": group}
    dcp.load(state, storage_reader=distckpt.dcp.Reader(path), **options)
    trained.take(state)
    return trained.digest()


def tensors(layout: str, number: float) -> dict[str, Any] | None:
    """Tensors that are known from the number, as four ranks hold them in that layout; None for who has no part."""
    whole = {"even": torch.arange(64.0).reshape(8, 8) * number, "uneven": torch.arange(35.0).reshape(7, 5) + number}
    whole |= {"tiny": torch.full((1, 3), number), "none": torch.empty(0, 4), "half": torch.ones(9).half() * number}
    if layout == "alone":
        return whole if dist.get_rank() == 0 else None
    square = torch.arange(4).reshape(2, 2)
    meshes = {"rows": torch.arange(4), "columns": torch.arange(4), "hybrid": square, "strided": square}
    placements: dict[str, list[Any]] = {
        "rows": [Shard(0)],
        "columns": [Shard(-1)],
        "hybrid": [Replicate(), Shard(0)],
        "strided": [_StridedShard(0, split_factor=2), Shard(0)],
    }
    mesh = DeviceMesh("cpu", meshes[layout])
    cut = whole if layout != "strided" else {"even": whole["even"]}  # torch itself cuts no others alike everywhere
    shared = {name: distribute_tensor(one, mesh, placements[layout], src_data_rank=None) for name, one in cut.items()}
    return {**shared, "plain": torch.full((3,), number), "list": [shared["even"] + 1, {"number": number}]}


def reshard(directory: str, before: str, after: str) -> dict[str, Any]:
    """Save in one layout and load in the other: what differs on this rank from what there should be."""
    held, target, expected = tensors(before, 3.0), tensors(after, 5.0), tensors(after, 3.0)
    if held is not None:
        dcp.save({"state": held}, storage_writer=distckpt.dcp.Writer(directory), no_dist=before == "alone")
    dist.barrier()
    if target is None or expected is None:
        return {}
    absent = {"alone": {"plain", "list"}, "strided": {"uneven", "tiny", "none", "half"}}.get(before, set())
    loaded = {"state": {name: target[name] for name in target if name not in absent}}
    dcp.load(loaded, storage_reader=distckpt.dcp.Reader(directory), no_dist=after == "alone")
    return {
        name: f"{value} and not {expected[name]}"
        for name, value in loaded["state"].items()
        if name != "list" and not torch.equal(_local(value), _local(expected[name]))
    }


def sharded_specs() -> list[Any]:
    """How torch's older ShardedTensor may lie over ranks: in rows, several of a rank's, unevenly, and in columns."""

    def pieces(*rows: tuple[int, int, int]) -> EnumerableShardingSpec:
        return EnumerableShardingSpec(
            [ShardMetadata([first, 0], [count, 20], f"rank:{rank}/cpu") for first, count, rank in rows]
        )

    def chunks(dim: int, *ranks: int) -> ChunkShardingSpec:
        return ChunkShardingSpec(dim, [f"rank:{rank}/cpu" for rank in ranks])

    return [chunks(0, 0, 1, 2, 3), chunks(0, 1, 2, 2, 0), pieces((0, 2, 3), (2, 1, 1), (3, 7, 0)), pieces((0, 8, 1), (8, 2, 2)),
            chunks(1, 3, 0)]  # fmt: skip


def reshard_sharded_tensors(directory: str) -> list[str]:
    """Save a ShardedTensor and a plain tensor in each layout, load them as each other in the next one: what differs."""
    specs, wrong = sharded_specs(), []
    for at, before in enumerate(specs):
        after = specs[(at + 1) % len(specs)]
        saved = {"sharded": sharded_tensor.rand(before, 10, 20), "plain": torch.arange(200.0).reshape(10, 20) + at}
        dcp.save({**saved, "text": f"of {at}"}, storage_writer=distckpt.dcp.Writer(directory))
        same = {"sharded": sharded_tensor.zeros(after, 10, 20), "plain": torch.zeros(10, 20), "text": ""}
        other = {"sharded": torch.zeros(10, 20), "plain": sharded_tensor.zeros(after, 10, 20)}
        for loaded in (same, other):
            dcp.load(loaded, storage_reader=distckpt.dcp.Reader(directory))
            wrong += [f"{at}: {key}" for key in saved if not torch.equal(_gathered(loaded[key]), _gathered(saved[key]))]
        wrong += [] if same["text"] == f"of {at}" else [f"{at}: text"]
    return wrong


def _gathered(tensor: Any) -> torch.Tensor:
    """All of it on rank 0, on other ranks nothing."""
    if not isinstance(tensor, ShardedTensor):
        return tensor if dist.get_rank() == 0 else torch.zeros(0)
    whole = torch.zeros(tensor.size()) if dist.get_rank() == 0 else None
    tensor.gather(out=whole)
    return torch.zeros(0) if whole is None else whole


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Fails(distckpt.dcp.Writer):
    """Fails at one of DCP's steps, if this is the rank that shall."""

    step: str | None = None

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "step"):
            raise OSError(f"{name} on rank {dist.get_rank()}")
        return super().__getattribute__(name)


def fail_at(directory: str, steps: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Save once for each step and rank that fails there, then well; what each save raised here."""
    told: list[dict[str, Any]] = []
    for step, rank in steps:
        writer = Fails(directory, 1)
        writer.step = step if dist.get_rank() == rank else None
        try:
            dcp.save({"w": torch.ones(4)}, storage_writer=writer)
        except CheckpointException as error:
            told.append({str(rank): str(problem) for rank, (problem, _) in error.failures.items()})
        else:
            told.append({})
    dcp.save({"w": torch.ones(4)}, storage_writer=distckpt.dcp.Writer(directory, 1))
    return told


def disagree(directory: str) -> list[str]:
    """Ranks that save other numbers, and that read other checkpoints: what each is told."""
    rank, told = dist.get_rank(), []
    calls = [
        lambda: dcp.save({"w": 1}, storage_writer=distckpt.dcp.Writer(directory, rank)),
        lambda: dcp.load({"progress": {}}, storage_reader=distckpt.dcp.Reader(f"{directory}/ckpt-{1 + rank // 3}")),
    ]
    for call in calls:
        try:
            call()
        except CheckpointException as error:
            told += [str(problem) for problem, _ in error.failures.values()]
    return told


def die_in_write_data(directory: str) -> str:
    """Rank 1 is killed while it writes: what the other is told."""
    writer = distckpt.dcp.Writer(directory, 1)
    if dist.get_rank() == 1:
        writer.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    try:
        dcp.save({"a": torch.ones(3), "b": torch.ones(3)}, storage_writer=writer)
    except BaseException as error:  # noqa: BLE001 - CheckpointException is one
        return f"{type(error).__name__}: {error}"
    return ""
