"""Which parts of which tensors a rank holds, as hyper-rectangles of the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard
from torch.nn.parameter import is_lazy

from distckpt.format.arrow.dtypes import ITEM_SIZES

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZES if hasattr(torch, name)}
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A hyper-rectangle of a whole tensor, and where it begins in the local tensor of the rank that holds it."""

    offset: tuple[int, ...]
    length: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A chunk of a tensor in this process's memory.

    ``offset`` and ``length`` are in the whole tensor. ``local`` is of shape ``length``, detached, and shares memory
    with the tensor it was cut from; it may be non-contiguous.
    """

    offset: tuple[int, ...]
    length: tuple[int, ...]
    local: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive indices of one dimension of the whole tensor."""

    start: int
    length: int


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without ``torch.``, such as ``bfloat16``. ValueError for a dtype that cannot be stored as bytes."""
    name = _NAMES.get(dtype)
    if name is None:
        raise ValueError(f"tensors of {dtype} cannot be stored")
    return name


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype that ``dtype_name`` gave this name. ValueError for any other text."""
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"{name!r} is no tensor dtype that this release (and this torch) knows")
    return dtype


def global_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor; a DTensor answers for all ranks together."""
    return tuple(int(size) for size in tensor.shape)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of ``tensor``, detached, sharing its memory.

    A collective still under way is waited for. ValueError for tensors that have no plain bytes: sparse, quantized,
    meta, lazily initialized and lazily conjugated ones, and wrapper subclasses other than DTensor.
    """
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    _check_has_bytes(tensor)
    return tensor.detach()


def _check_has_bytes(tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if is_lazy(tensor):
        raise ValueError(f"a {kind.__name__} has no shape yet; run the model once before saving")
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(f"a {kind.__name__} keeps its bytes in other tensors; save those instead")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError("only dense tensors can be saved: sparse, quantized and nested ones have no plain bytes")
    if tensor.is_meta:
        raise ValueError("the tensor is on the meta device and has no data")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("the tensor is conjugated or negated only by a mark; call resolve_conj().resolve_neg() first")


def pieces(tensor: torch.Tensor) -> list[Piece]:
    """Every part of ``tensor`` that this rank holds; none if its part is empty or it is outside the tensor's mesh.

    A plain tensor is one piece. A tensor that is empty as a whole is one piece of zero bytes on every rank. ValueError
    for Partial placements, for placements that this release does not know, and for tensors without plain bytes.
    """
    if not isinstance(tensor, DTensor):
        local = local_tensor(tensor)
        shape = global_shape(local)
        return [Piece((0,) * len(shape), shape, local)]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    local = local_tensor(tensor)
    return _cut(local, global_shape(tensor), _held(tensor, tuple(local.shape), tuple(coordinate)))


def _cut(local: torch.Tensor, shape: tuple[int, ...], rectangles: Sequence[Rectangle]) -> list[Piece]:
    if 0 in shape:
        return [Piece((0,) * len(shape), shape, local.new_empty(shape))]
    return [Piece(item.offset, item.length, _window(local, item)) for item in rectangles]


def _window(local: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(rectangle.start, rectangle.length, strict=True)):
        local = local.narrow(dim, start, length)
    return local


def _held(tensor: DTensor, held: tuple[int, ...], coordinate: tuple[int, ...]) -> list[Rectangle]:
    """The rectangles of a DTensor, checked against the shape that the local tensor really has."""
    shape, mesh_shape = global_shape(tensor), tuple(tensor.device_mesh.shape)
    for order in _possible_orders(tensor):
        found = rectangles(shape, mesh_shape, coordinate, tensor.placements, order)
        if _spanned(found, len(shape)) == held or (not found and math.prod(held) == 0):
            return found
    raise ValueError(
        f"a DTensor of shape {shape} with placements {tuple(tensor.placements)} on a mesh of {mesh_shape} "
        f"holds a local tensor of shape {held} at {coordinate}, which those placements do not give"
    )


def _possible_orders(tensor: DTensor) -> Iterator[tuple[int, ...] | None]:
    """Orders of cutting to try. None stands for the one that the placements say.

    Newer torch keeps the order with the tensor. Where sizes are uneven, distribute_tensor cuts _StridedShard in another
    way than fully_shard, and only the local shape tells which it was. If ranks came to different answers, the plan would
    refuse what they describe.
    """
    # _spec alone has it.
    entries = getattr(tensor._spec, "shard_order", None)
    yield None if entries is None else tuple(mesh_dim for entry in entries for mesh_dim in entry.mesh_dims)
    if any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        yield tuple(range(len(tensor.placements)))


def _spanned(found: Sequence[Rectangle], ndim: int) -> tuple[int, ...]:
    return tuple(max((item.start[dim] + item.length[dim] for item in found), default=0) for dim in range(ndim))


def rectangles(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    order: Sequence[int] | None = None,
) -> list[Rectangle]:
    """What the rank at ``coordinate`` of a mesh holds of a tensor of that shape; none if its part is empty.

    Pure: needs no process group. ``order`` lists mesh dimensions in the order in which they cut (those that replicate
    count for nothing), and takes placements literally. Without it the order is left to right, or, with _StridedShard as
    fully_shard makes it over tensor parallelism, the one that its split factors stand for. ValueError for Partial and
    unknown placements.
    """
    for placement in placements:
        _check_placement(placement)
    if order is None:
        order, splits = _order_of(placements, mesh_shape)
    else:
        order = [mesh_dim for mesh_dim in order if not isinstance(placements[mesh_dim], Replicate)]
        splits = {mesh_dim: _split_factor(placements[mesh_dim]) for mesh_dim in order}
    runs = [[_Run(0, size)] for size in shape]
    for mesh_dim in order:
        dim = _shard_dim(placements[mesh_dim], len(shape))
        runs[dim] = _share(runs[dim], mesh_shape[mesh_dim], coordinate[mesh_dim], splits.get(mesh_dim, 1))
    return list(_rectangles_of(runs))


def _check_placement(placement: Placement) -> None:
    if placement.is_partial():
        raise ValueError(
            f"a DTensor with placement {placement!r} is a sum (or the like) that has not been reduced yet; "
            "redistribute it to Shard or Replicate before saving"
        )
    known = isinstance(placement, (Shard, _StridedShard, Replicate))
    if not known:
        raise ValueError(f"a DTensor with placement {placement!r} cannot be saved: that placement is not known")


def _shard_dim(placement: Placement, ndim: int) -> int:
    assert isinstance(placement, (Shard, _StridedShard))
    dim = placement.dim + ndim if placement.dim < 0 else placement.dim
    if not 0 <= dim < ndim:
        raise ValueError(f"placement {placement} shards a dimension that a tensor of {ndim} dimensions does not have")
    return dim


def _split_factor(placement: Placement) -> int:
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


def _order_of(placements: Sequence[Placement], mesh_shape: Sequence[int]) -> tuple[Sequence[int], dict[int, int]]:
    """Mesh dimensions in the order in which they cut, and the split factors that this order does not explain.

    A _StridedShard on dimension d with split factor f says that mesh dimensions to its right, f shards together, cut d
    before it. If no such order exists (views make such placements) they are literal: split, then interleave.
    """
    sharding = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    factors = {dim: _split_factor(placements[dim]) for dim in sharding}
    order: list[int] = []
    for mesh_dim in reversed(sharding):
        same = [other for other in order if _same_dim(placements[other], placements[mesh_dim])]
        before = _explained_by(factors[mesh_dim], [mesh_shape[other] for other in same])
        if before is None:
            return sharding, factors
        order.insert(order.index(same[before]) if before < len(same) else len(order), mesh_dim)
    return order, {}


def _same_dim(one: Placement, other: Placement) -> bool:
    return getattr(one, "dim", None) == getattr(other, "dim", None)


def _explained_by(factor: int, sizes: Sequence[int]) -> int | None:
    """How many of the leading ``sizes`` multiply to ``factor``; None if no number of them does."""
    for count in range(len(sizes) + 1):
        if math.prod(sizes[:count]) == factor:
            return count
    return None


def _share(runs: Sequence[_Run], count: int, index: int, split_factor: int) -> list[_Run]:
    """Part ``index`` of ``count`` of the indices in ``runs``, as torch.chunk cuts them, out of each of the splits."""
    total = sum(run.length for run in runs)
    shared: list[_Run] = []
    for split in range(split_factor):
        start, length = _chunk(total, split_factor, split)
        inner, held = _chunk(length, count, index)
        _extend(shared, _between(runs, start + inner, held))
    return shared


def _chunk(size: int, count: int, index: int) -> tuple[int, int]:
    """Where part ``index`` of ``count`` begins and how long it is: all parts but the last are equal, rounded up."""
    step = -(-size // count)
    start = min(index * step, size)
    return start, min(step, size - start)


def _between(runs: Sequence[_Run], start: int, length: int) -> Iterator[_Run]:
    """The indices at positions start to start + length of the sequence that ``runs`` spell out."""
    position = 0
    for run in runs:
        low, high = max(start, position), min(start + length, position + run.length)
        if low < high:
            yield _Run(run.start + low - position, high - low)
        position += run.length


def _extend(runs: list[_Run], more: Iterator[_Run]) -> None:
    """Append, joining a run to the last one where it goes on without a gap."""
    for run in more:
        if runs and runs[-1].start + runs[-1].length == run.start:
            runs[-1] = _Run(runs[-1].start, runs[-1].length + run.length)
        else:
            runs.append(run)


def _rectangles_of(runs: Sequence[Sequence[_Run]]) -> Iterator[Rectangle]:
    """The product of one run of every dimension; local positions count up along each dimension's runs."""
    placed = [list(_with_positions(along)) for along in runs]
    for choice in product(*placed):
        length = tuple(run.length for run, _ in choice)
        if 0 not in length:
            yield Rectangle(tuple(run.start for run, _ in choice), length, tuple(start for _, start in choice))


def _with_positions(runs: Sequence[_Run]) -> Iterator[tuple[_Run, int]]:
    position = 0
    for run in runs:
        yield run, position
        position += run.length
