"""Restores measured: the same number of ranks as wrote, more, and fewer; files in the page cache, and not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Contender, Spans, alternate, now
from states import LAYERS, holds, nbytes, sharded_state, tensors
from torch.distributed.tensor import DTensor

import distckpt

READ_BYTES = 16 << 20


def write(folder: str) -> None:
    """Save the state once by everyone, each into a folder of its own."""
    root, tree = Path(folder), sharded_state()
    with distckpt.CheckpointManager(distckpt.Checkpoint(train=tree), root / "distckpt") as manager:
        pending = manager.save(1)
        assert pending is not None
        pending.result()
    dcp.save({"train": tree}, checkpoint_id=root / "dcp")
    torch.save(list(tensors(tree)), root / f"{dist.get_rank()}.pt")


def load(folder: str, repetitions: int, cold: bool, torch_load: bool) -> dict[str, Any]:
    """Everyone fills the same live tensors. ``torch_load`` needs as many ranks as wrote."""
    root, tree = Path(folder), sharded_state()
    contenders: list[Contender] = [_Distckpt(tree, root, cold), _Dcp(tree, root, cold)]
    if torch_load:
        contenders.append(_TorchLoad(tree, root, cold))
    files = [file for file in root.rglob("*") if file.is_file()]
    if dist.get_rank() == 0:
        for file in files:
            _read(file)
    return {"bytes": nbytes(tree), "measured": alternate(contenders, repetitions)}


class _Restore:
    """One way to fill the tensors. Checks after the first time that they are what was saved."""

    name = ""

    def __init__(self, tree: dict[str, Any], root: Path, cold: bool) -> None:
        self.tree = tree
        self.root = root
        self._cold = cold

    def run(self, number: int) -> Spans:
        """Fill the tensors from files that are all in the page cache, or that none are."""
        for tensor in tensors(self.tree):
            tensor.fill_(-1)
        if self._cold and dist.get_rank() == 0:
            for file in self.root.rglob("*"):
                _forget(file)
        dist.barrier()
        before, begin = _bytes_read(), now()
        self.fill()
        end, after = now(), _bytes_read()
        if not number:
            _check(self.tree, self.name)
        # A count of bytes travels as a span too; its length is what counts.
        return {"restore": (begin, end), "read": (before, after)}

    def fill(self) -> None:
        raise NotImplementedError

    def clean(self, number: int) -> None:
        """Nothing is left."""


class _Distckpt(_Restore):
    name = "distckpt"

    def fill(self) -> None:
        distckpt.Checkpoint(train=self.tree).restore(self.root / "distckpt" / "ckpt-1").assert_consumed()


class _Dcp(_Restore):
    name = "dcp"

    def fill(self) -> None:
        dcp.load({"train": self.tree}, checkpoint_id=self.root / "dcp")


class _TorchLoad(_Restore):
    name = "torch.load"

    def fill(self) -> None:
        saved = torch.load(self.root / f"{dist.get_rank()}.pt", mmap=True, weights_only=True)
        for tensor, source in zip(tensors(self.tree), saved, strict=True):
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


def _bytes_read() -> int:
    """Bytes that this process has asked the kernel to read so far."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def _read(file: Path) -> None:
    buffer = bytearray(READ_BYTES)
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def _forget(file: Path) -> None:
    if file.is_file():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
