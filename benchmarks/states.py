"""The state that everybody saves: a model and Adam's moments in fp32, 120 tensors of 10 MB, sharded over the ranks."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

LAYERS = 40
SHAPE = (2050, 1220)
"""Rows that 4 does not divide, so that going from 2 ranks to 4 does not happen to fit."""


def sharded_state(layers: int = LAYERS, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """A nested dict of DTensors, split along their first dimension over all ranks, and one plain value."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    names = [f"layers.{number}.weight" for number in range(layers)]
    trees = {
        kind: {name: _filled(mesh, shape, which * layers + number) for number, name in enumerate(names)}
        for which, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))
    }
    return {"model": trees.pop("weight"), "optimizer": trees, "step": 100}


def _filled(mesh: DeviceMesh, shape: tuple[int, int], seed: int) -> DTensor:
    rows, columns = shape
    step = -(-rows // mesh.size())
    begin = min(rows, mesh.get_local_rank() * step)
    local = torch.empty((min(rows, begin + step) - begin, columns))
    fill(local, begin * columns, seed)
    return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=(columns, 1))


def fill(local: torch.Tensor, begin: int, seed: int) -> None:
    """Give each element a value that tells its place in the whole tensor, exactly as fp32 holds it."""
    torch.arange(begin, begin + local.numel(), out=local.view(-1))
    local.add_(seed)


def holds(local: torch.Tensor, begin: int, seed: int) -> bool:
    """Whether ``local`` is what ``fill`` made."""
    expected = torch.empty_like(local)
    fill(expected, begin, seed)
    return torch.equal(local, expected)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested dicts, as this rank holds it."""
    if isinstance(tree, torch.Tensor):
        yield tree.to_local() if isinstance(tree, DTensor) else tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)


def nbytes(tree: Any) -> int:
    """Bytes that this rank holds."""
    return sum(tensor.nbytes for tensor in tensors(tree))


class Copy:
    """Warm, page-aligned memory as large as what this rank holds, and the plainest way to copy it there."""

    name = "copy"

    def __init__(self, tree: Any) -> None:
        self._sources = list(tensors(tree))
        size = sum(source.nbytes for source in self._sources)
        self.memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._targets = list(_slices(torch.frombuffer(self.memory, dtype=torch.uint8), self._sources))
        self.run(0)

    def run(self, number: int) -> dict[str, tuple[float, float]]:
        """Copy all of it once."""
        from rounds import now

        begin = now()
        for source, target in zip(self._sources, self._targets, strict=True):
            target.copy_(source)
        return {"stall": (begin, now())}

    def clean(self, number: int) -> None:
        """Nothing is left."""


def _slices(memory: torch.Tensor, sources: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    position = 0
    for source in sources:
        yield memory[position : position + source.nbytes].view(source.dtype).view(source.shape)
        position += source.nbytes
