"""Restores measured: the same number of ranks as wrote, more, and fewer; files in the page cache, and not, and as a save
has left them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Spans, alternate, now
from states import LAYERS, holds, nbytes, sharded_state, tensors
from torch.distributed.tensor import DTensor

import distckpt

READ_BYTES = 16 << 20


SMALL: dict[str, Any] = {"layers": 2, "shape": (64, 64)}


def write(folder: str, small: bool = False) -> None:
    """Save the state once by everyone, each into a folder of its own."""
    root, tree = Path(folder), sharded_state(**(SMALL if small else {}))
    with distckpt.CheckpointManager(distckpt.Checkpoint(train=tree), root / "distckpt") as manager:
        pending = manager.save(1)
        pending.result()
    dcp.save({"train": tree}, checkpoint_id=root / "dcp")
    torch.save(list(tensors(tree)), root / f"{dist.get_rank()}.pt")


def load(folder: str, repetitions: int, cold: bool, torch_load: bool) -> dict[str, Any]:
    """Everyone fills the same live tensors. ``torch_load`` needs as many ranks as wrote."""
    root, tree = Path(folder), {"train": sharded_state()}
    checkpoint = distckpt.Checkpoint(**tree)
    ways: dict[str, Callable[[], object]] = {
        "distckpt": lambda: checkpoint.restore(root / "distckpt" / "ckpt-1").assert_consumed(),
        "dcp": lambda: dcp.load(tree, checkpoint_id=root / "dcp"),
    }
    if torch_load:
        ways["torch.load"] = lambda: _torch_load(tree, root / f"{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        for file in _files(root):
            _read(file)
    restores = [Restore(name, way, tree["train"], root, cold) for name, way in ways.items()]
    return {"bytes": nbytes(tree), "measured": alternate(restores, repetitions)}


def restart(folder: str, small: str, number: int) -> dict[str, Any]:
    """What a new process does after a crash: everyone fills once what a save has just left, and nobody has read.

    ``small`` is a folder of small files, which each has read before, so that what it imports is there.
    """
    measured: dict[str, dict[str, list[tuple[float, float]]]] = {}
    if dist.get_rank() == 0:
        os.sync()  # what others have written is not to be written while they are measured
    for root, tree in ((small, sharded_state(**SMALL)), (folder, sharded_state())):
        held, where = {"train": tree}, Path(root)
        ways = {
            "distckpt": partial(distckpt.Checkpoint(**held).restore, where / "distckpt" / "ckpt-1"),
            "dcp": partial(dcp.load, held, checkpoint_id=where / "dcp"),
        }
        for name in sorted(ways, reverse=number % 2 == 1):
            spans = Restore(name, ways[name], tree, where, cold=False).run(1)
            measured[name] = {what: [span] for what, span in spans.items()}
    return {"bytes": nbytes(tree), "measured": measured}


@dataclass(frozen=True)
class Restore:
    """One way to fill the tensors of ``tree`` from files below ``root``; ``cold``: none of them is in the page cache."""

    name: str
    fill: Callable[[], object]
    tree: dict[str, Any]
    root: Path
    cold: bool

    def run(self, number: int) -> Spans:
        """Fill the tensors. The first time, check that they hold what was saved."""
        for tensor in tensors(self.tree):
            tensor.fill_(-1)
        if self.cold and dist.get_rank() == 0:
            for file in _files(self.root):
                _forget(file)
        dist.barrier()
        before, begin = _bytes_read(), now()
        self.fill()
        end, after = now(), _bytes_read()
        if not number:
            _check(self.tree, self.name)
        return {"restore": (begin, end), "read": (before, after)}

    def clean(self, number: int) -> None:
        """Nothing is left."""


def _torch_load(tree: dict[str, Any], file: Path) -> None:
    saved = torch.load(file, mmap=True, weights_only=True)
    for tensor, source in zip(tensors(tree), saved, strict=True):
        tensor.copy_(source)


def _check(tree: dict[str, Any], name: str) -> None:
    kinds = (tree["model"], tree["optimizer"]["exp_avg"], tree["optimizer"]["exp_avg_sq"])
    for which, kind in enumerate(kinds):
        for number, tensor in enumerate(kind.values()):
            if not holds(tensor.to_local(), _begin(tensor), which * LAYERS + number):
                raise AssertionError(f"{name} has not restored what was saved")


def _begin(tensor: DTensor) -> int:
    rows, columns = tensor.shape
    return min(rows, dist.get_rank() * -(-rows // dist.get_world_size())) * columns


def _files(root: Path) -> list[Path]:
    return [file for file in root.rglob("*") if file.is_file()]


def _bytes_read() -> int:
    """Bytes that this process has read so far, from the page cache or from the disk."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def _read(file: Path) -> None:
    buffer = bytearray(READ_BYTES)
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def _forget(file: Path) -> None:
    with file.open("rb") as source:
        os.fsync(source.fileno())
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
