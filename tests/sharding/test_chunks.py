"""Chunks: every rank's rectangles are what torch really put there, for any placements, mesh and sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from distckpt.sharding.chunks import (
    Rectangle,
    dtype_from_name,
    dtype_name,
    global_shape,
    local_tensor,
    pieces,
    rectangles,
)
from distckpt.sharding.description import Row, build_description
from distckpt.sharding.plan import make_plan
from tests.support.gang import Gang

# ---- a model of cutting that moves real indices about ---------------------------------------------------------------


def _parts(indices: np.ndarray, count: int, dim: int) -> list[np.ndarray]:
    """What torch.chunk would give, with empty parts at the end."""
    step = max(1, -(-indices.shape[dim] // count))
    return [
        indices.take(range(*slice(i * step, (i + 1) * step).indices(indices.shape[dim])), dim) for i in range(count)
    ]


def _cut_in_order(whole: np.ndarray, cuts: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Cut (dimension, count, index) by (dimension, count, index)."""
    for dim, count, index in cuts:
        whole = _parts(whole, count, dim)[index]
    return whole


def _cut_literally(whole: np.ndarray, placement: Placement, count: int, index: int) -> np.ndarray:
    if isinstance(placement, _StridedShard):
        halves = _parts(whole, int(placement.split_factor), placement.dim)
        return np.concatenate([_parts(half, count, placement.dim)[index] for half in halves], placement.dim)
    return whole if isinstance(placement, Replicate) else _parts(whole, count, placement.dim)[index]


def _indices(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def _picked(shape: Sequence[int], found: Sequence[Rectangle], local_shape: Sequence[int]) -> np.ndarray:
    """A local tensor of indices, put together from the rectangles alone; -1 where none of them reaches."""
    whole, local = _indices(shape), np.full(local_shape, -1)
    for item in found:
        there = tuple(slice(begin, begin + length) for begin, length in zip(item.offset, item.length, strict=True))
        here = tuple(slice(begin, begin + length) for begin, length in zip(item.start, item.length, strict=True))
        assert (local[here] == -1).all()
        local[here] = whole[there]
    return local


def _coordinates(mesh: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in mesh))


SHAPES = st.lists(st.integers(0, 13), min_size=1, max_size=3)
MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@st.composite
def plain_layouts(draw: st.DrawFn) -> tuple[list[int], list[int], list[Placement]]:
    shape, mesh = draw(SHAPES), draw(MESHES)
    kinds = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    return shape, mesh, [draw(kinds) for _ in mesh]


@given(plain_layouts())
@settings(deadline=None)
def test_shard_and_replicate_match_a_model_that_moves_indices(layout: tuple[list[int], list[int], list[Any]]) -> None:
    shape, mesh, placements = layout
    for coordinate in _coordinates(mesh):
        expected = _indices(shape)
        for placement, count, index in zip(placements, mesh, coordinate, strict=True):
            expected = _cut_literally(expected, placement, count, index)
        found = rectangles(shape, mesh, coordinate, placements)
        assert len(found) == (1 if expected.size else 0)
        np.testing.assert_array_equal(_picked(shape, found, expected.shape), expected)


@given(plain_layouts())
@settings(deadline=None)
def test_shard_and_replicate_match_torch(layout: tuple[list[int], list[int], list[Any]]) -> None:
    shape, mesh, placements = layout
    for coordinate in _coordinates(mesh):
        size, offset = _compute_local_shape_and_global_offset(tuple(shape), tuple(mesh), list(coordinate), placements)
        expected = [Rectangle(tuple(offset), tuple(size), (0,) * len(shape))] if math.prod(size) else []
        assert rectangles(shape, mesh, coordinate, placements) == expected


@st.composite
def ordered_layouts(draw: st.DrawFn) -> tuple[int, list[int], list[Placement], list[int]]:
    """One dimension cut by several mesh dimensions in any order, told as fully_shard tells it."""
    size, mesh = draw(st.integers(0, 40)), draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(mesh))))
    placements: list[Placement] = []
    for mesh_dim in range(len(mesh)):
        before = order[: order.index(mesh_dim)]
        factor = math.prod(mesh[other] for other in before if other > mesh_dim)
        placements.append(_StridedShard(0, split_factor=factor) if factor > 1 else Shard(0))
    return size, mesh, placements, list(order)


@given(ordered_layouts())
@settings(deadline=None)
def test_strided_shards_stand_for_an_order_of_cutting(layout: tuple[int, list[int], list[Any], list[int]]) -> None:
    size, mesh, placements, order = layout
    for coordinate in _coordinates(mesh):
        expected = _cut_in_order(_indices([size]), [(0, mesh[dim], coordinate[dim]) for dim in order])
        found = rectangles([size], mesh, coordinate, placements)
        assert len(found) <= 1
        np.testing.assert_array_equal(_picked([size], found, expected.shape), expected)


@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(2, 3), st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_literal_strided_shards_match_a_model_that_moves_indices(
    shape: list[int], cuts: list[tuple[int, int, int]]
) -> None:
    mesh = [count for count, _, _ in cuts]
    placements = [_StridedShard(dim % len(shape), split_factor=factor) for _, dim, factor in cuts]
    for coordinate in _coordinates(mesh):
        expected = _indices(shape)
        for placement, count, index in zip(placements, mesh, coordinate, strict=True):
            expected = _cut_literally(expected, placement, count, index)
        found = rectangles(shape, mesh, coordinate, placements, order=range(len(mesh)))
        np.testing.assert_array_equal(_picked(shape, found, expected.shape), expected)


def test_a_split_factor_that_no_mesh_explains_gives_several_runs() -> None:
    found = rectangles([24], [4], [1], [_StridedShard(0, split_factor=2)])
    assert found == [Rectangle((3,), (3,), (0,)), Rectangle((15,), (3,), (3,))]


def test_runs_of_two_dimensions_multiply() -> None:
    placements = [_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)]
    found = rectangles([4, 8], [2, 2], [0, 1], placements)
    assert found == [
        Rectangle((0, 2), (1, 2), (0, 0)),
        Rectangle((0, 6), (1, 2), (0, 2)),
        Rectangle((2, 2), (1, 2), (1, 0)),
        Rectangle((2, 6), (1, 2), (1, 2)),
    ]


def test_partial_and_unknown_placements_are_refused() -> None:
    class Diagonal(Placement):
        pass

    with pytest.raises(ValueError, match=r"Partial.*not been reduced"):
        rectangles([4], [2], [0], [Partial()])
    with pytest.raises(ValueError, match="not known"):
        rectangles([4], [2], [0], [Diagonal()])
    with pytest.raises(ValueError, match="a dimension that a tensor of 1 dimensions does not have"):
        rectangles([4], [2], [0], [Shard(1)])


# ---- plain tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (0, 4)])
def test_a_plain_tensor_is_one_piece_that_shares_its_memory(shape: tuple[int, ...]) -> None:
    tensor = torch.nn.Parameter(torch.randn(shape))
    (piece,) = pieces(tensor)
    assert (piece.offset, piece.length) == ((0,) * len(shape), shape)
    assert not piece.local.requires_grad
    piece.local.fill_(7.0)
    assert (tensor == 7.0).all()


def test_a_transposed_tensor_keeps_its_strides() -> None:
    tensor = torch.arange(12).view(3, 4).t()
    (piece,) = pieces(tensor)
    assert piece.length == (4, 3)
    assert piece.local.data_ptr() == tensor.data_ptr()
    assert torch.equal(piece.local, tensor)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "only dense tensors"),
        (torch.ones(2, dtype=torch.complex64).conj(), "resolve_conj"),
        (torch.nn.UninitializedParameter(), "no shape yet"),
    ],
)
def test_tensors_without_plain_bytes_are_refused(tensor: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pieces(tensor)


def test_wrapper_tensors_are_refused_but_plain_subclasses_are_not() -> None:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented

    class Named(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="a Wrapper keeps its bytes in other tensors"):
        local_tensor(torch.zeros(2).as_subclass(Wrapper))
    assert local_tensor(torch.ones(2).as_subclass(Named)).tolist() == [1.0, 1.0]


def test_dtype_names_go_both_ways_and_nothing_else_is_looked_up() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint16):
        assert dtype_from_name(dtype_name(dtype)) is dtype
    assert dtype_name(torch.float) == "float32"
    for name in ("float", "load", "os", "json", "torch.float32", ""):
        with pytest.raises(ValueError, match="no tensor dtype"):
            dtype_from_name(name)
    with pytest.raises(ValueError, match="qint8"):
        dtype_name(torch.qint8)


# ---- one rank of eight, with no others -------------------------------------------------------------------------------


@pytest.fixture(params=range(8))
def eight(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """This process is one rank of a 4 x 2 mesh whose other ranks do not exist; its coordinate."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=8)
    yield divmod(request.param, 2)
    dist.destroy_process_group()


def _of_nine(local: np.ndarray) -> DTensor:
    """A DTensor of nine elements around this local tensor, with the placements that fully_shard gives (HSDP over TP)."""
    placements = [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]
    mesh = DeviceMesh("cpu", torch.arange(8).view(1, 4, 2))
    return DTensor.from_local(torch.tensor(local), mesh, placements, run_check=False, shape=(9,), stride=(1,))


def _indices_of(tensor: DTensor) -> list[int]:
    held = []
    for piece in pieces(tensor):
        assert piece.local.tolist() == list(range(piece.offset[0], piece.offset[0] + piece.length[0]))
        held += piece.local.tolist()
    return held


def test_uneven_shards_of_fully_shard_over_tensor_parallelism(eight: tuple[int, int]) -> None:
    local = _cut_in_order(_indices([9]), [(0, 2, eight[1]), (0, 4, eight[0])])
    assert _indices_of(_of_nine(local)) == local.tolist()


def test_uneven_shards_of_distribute_tensor(eight: tuple[int, int]) -> None:
    local = _cut_literally(_indices([9]), _StridedShard(0, split_factor=2), 4, eight[0])
    local = _cut_literally(local, Shard(0), 2, eight[1])
    assert _indices_of(_of_nine(local)) == local.tolist()


def test_a_local_tensor_that_the_placements_do_not_give_is_refused(eight: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"local tensor of shape \(7,\) .* which those placements do not give"):
        pieces(_of_nine(np.arange(7)))


# ---- real ranks -------------------------------------------------------------------------------------------------------


class _Net(torch.nn.Module):
    """Sizes that no number of ranks divides, an empty share for some ranks, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(5, 11)
        self.down = torch.nn.Linear(11, 3, bias=False)
        self.register_buffer("steps", torch.tensor(3.0))


def _filled(net: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for number, tensor in enumerate(net.parameters()):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + 1000 * number)
    return net


def _fsdp() -> dict[str, torch.Tensor]:
    net = _filled(_Net())
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    return net.state_dict()


def _hsdp() -> dict[str, torch.Tensor]:
    net = _filled(_Net())
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return net.state_dict()


def _fsdp_over_tp() -> dict[str, torch.Tensor]:
    net = _filled(_Net())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    assert any(isinstance(item, _StridedShard) for item in net.state_dict()["up.weight"].placements)
    return net.state_dict()


def _distributed() -> dict[str, torch.Tensor]:
    """DTensors that no module made: two dimensions, a view with interleaved runs, an empty one, a part of the ranks."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    values = torch.arange(35.0)
    uneven = distribute_tensor(values, square, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None)
    return {
        "grid": distribute_tensor(values.view(5, 7), square, [Shard(1), Shard(0)]),
        "view": distribute_tensor(torch.arange(24.0).view(2, 12), flat, [Shard(1)]).view(24),
        "strided": uneven,
        "empty": distribute_tensor(torch.empty(0, 3), flat, [Shard(0)]),
        "two of four": distribute_tensor(values, DeviceMesh("cpu", [1, 3]), [Shard(0)]),
    }


LAYOUTS = {"fsdp": _fsdp, "hsdp": _hsdp, "fsdp over tp": _fsdp_over_tp, "distributed": _distributed}


def held_by_this_rank(layout: str) -> dict[str, dict[str, Any]]:
    """Runs on every rank: what ``pieces`` says, and the whole tensors that torch gathers."""
    told = {}
    for key, tensor in LAYOUTS[layout]().items():
        found = pieces(tensor)
        inside = not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None
        if inside and tensor.numel():
            storage = local_tensor(tensor).untyped_storage().data_ptr()
            assert all(piece.local.untyped_storage().data_ptr() == storage for piece in found)
        assert all(tuple(piece.local.shape) == piece.length for piece in found)
        full = tensor.full_tensor() if isinstance(tensor, DTensor) and inside else tensor
        told[key] = {
            "shape": global_shape(tensor),
            "pieces": [(piece.offset, piece.length, piece.local.tolist()) for piece in found],
            "full": full.tolist() if inside else None,
        }
    return told


def partial_is_refused() -> str:
    """Runs on every rank: the message for a DTensor that is still to be reduced."""
    tensor = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (4,)), [Partial()])
    with pytest.raises(ValueError, match="not been reduced") as caught:
        pieces(tensor)
    return str(caught.value)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Gang]:
    with Gang(4) as gang:
        yield gang


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_of_all_ranks_make_the_tensor_that_torch_gathers(ranks: Gang, layout: str) -> None:
    held = ranks.run("sharding.test_chunks:held_by_this_rank", layout=layout)
    for key in held[0]:
        full = np.array(next(told[key]["full"] for told in held if told[key]["full"] is not None))
        full = full.reshape(held[0][key]["shape"])
        seen = np.zeros(full.shape, int)
        for offset, length, values in (piece for told in held for piece in told[key]["pieces"]):
            where = tuple(slice(begin, begin + size) for begin, size in zip(offset, length, strict=True))
            np.testing.assert_array_equal(full[where], np.array(values).reshape(length))
            seen[where] += 1
        assert (seen > 0).all(), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_real_ranks_hold_can_be_planned(ranks: Gang, layout: str) -> None:
    held = ranks.run("sharding.test_chunks:held_by_this_rank", layout=layout)
    rows = [
        [
            Row(key, f'["{key}"]', "float32", tuple(told["shape"]), tuple(offset), tuple(length), 4 * math.prod(length))
            for key, told in mine.items()
            for offset, length, _ in told["pieces"]
        ]
        for mine in held
    ]
    plan = make_plan(1, {rank: build_description(mine).encode() for rank, mine in enumerate(rows)}, {})
    written = sum(plan.table["nbytes"].to_pylist())
    assert written == sum(4 * math.prod(told["shape"]) for told in held[0].values())


def test_hybrid_shards_are_held_by_every_replica(ranks: Gang) -> None:
    held = ranks.run("sharding.test_chunks:held_by_this_rank", layout="hsdp")
    assert held[0] == held[2]
    assert held[1] == held[3]
    assert held[0]["up.weight"]["pieces"] != held[1]["up.weight"]["pieces"]


def test_a_tensor_that_is_still_to_be_reduced_is_refused(ranks: Gang) -> None:
    assert "Partial" in ranks.run("sharding.test_chunks:partial_is_refused")[0]
