"""Staging and writing: every bit of a rank's state reaches the store, with the checksums that the receipt says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import crc32c
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import AlreadyExistsError, DamagedError
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.format.arrow.shard import Chunk, build_image
from distckpt.format.tree.values import decode_value, encode_value
from distckpt.rank.step_order import StepOrder
from distckpt.storage import LocalStore, MemoryStore
from distckpt.transfer.arena import Arena
from distckpt.transfer.filecrc import FileCrc
from distckpt.transfer.staging import Staging
from distckpt.transfer.writer import write_shard
from tests.support.part import examples
from tests.support.shards import rows_of

MIB = 1 << 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [name for name in ITEM_SIZES if hasattr(torch, name)]


def chunk_of(key, tensor):
    shape = tuple(tensor.shape)
    return Chunk(key, str(tensor.dtype).removeprefix("torch."), shape, (0,) * len(shape), shape, tensor.nbytes)


def value_chunk(key):
    return Chunk(key, "json", (), (), (), 0)


def staging_of(tensors, values=(), max_shard_bytes=8 << 30):
    chunks = [chunk_of(f"t{number}", tensor) for number, tensor in enumerate(tensors)]
    chunks += [value_chunk(f"v{number}") for number in range(len(values))]
    return Staging(chunks, values, max_shard_bytes)


def bits(tensor):
    """The tensor's bytes in row-major order, with no arithmetic on the way."""
    return bytes(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())


def written(staging, store=None, **options):
    """Every row of every shard, and the receipts."""
    store = store or MemoryStore()
    receipts = [write_shard(store, f"a/{shard.number}.arrow", shard, **options) for shard in staging.shards]
    rows = []
    for receipt in receipts:
        data = store.read(f"a/{receipt.shard}.arrow", 1 << 40)
        check_receipt(receipt, data)
        rows += rows_of(data)
    return rows, receipts


def check_receipt(receipt, data):
    """The receipt says what is in the file, block by block."""
    assert receipt.size == len(data)
    assert receipt.crc32c == crc32c.crc32c(data)
    positions, sizes, block_sizes = (
        np.frombuffer(column, dtype="<i8").tolist()
        for column in (receipt.positions, receipt.sizes, receipt.block_sizes)
    )
    assert len(positions) == len(sizes) == len(block_sizes) == receipt.rows
    running = []
    for position, size, block in zip(positions, sizes, block_sizes, strict=True):
        payload = data[position : position + size]
        running += [crc32c.crc32c(payload[: (n + 1) * block]) for n in range(max(1, math.ceil(size / block)))]
    assert np.frombuffer(receipt.blocks, dtype="<u4").tolist() == running


def patterns(name, seed=0):
    """A tensor of that dtype with every bit pattern of its 8 or 16 bits, or random ones: NaNs with payloads and all."""
    size = ITEM_SIZES[name]
    if name == "bool":
        raw = np.arange(512) % 3 == 0
    elif size == 1:
        raw = np.arange(256, dtype=np.uint8)
    elif size == 2 and name != "complex32":
        raw = np.arange(65536, dtype=np.uint16)
    else:
        raw = np.random.default_rng(seed).integers(0, 256, 1024 * size, dtype=np.uint8)
    return torch.frombuffer(bytearray(raw.tobytes()), dtype=getattr(torch, name))


# ---- the bits -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_of_every_dtype_is_stored_whatever_the_strides(name):
    flat = patterns(name)
    square = flat.reshape(-1, 16)
    tensors = [flat[:1], flat[1], flat, square.t(), square[:, 3:9:2], flat[:16].expand(3, 16), square[:0], flat[5:8]]
    for first in range(4):
        moved = [torch.zeros(3 * first, dtype=torch.uint8), *tensors]  # no position is too odd
        staging = staging_of(moved)
        staging.stage(moved, [])
        rows, _ = written(staging)
        assert [row["data"] for row in rows] == [bits(tensor) for tensor in moved]
        assert [row["dtype"] for row in rows] == ["uint8"] + [name] * len(tensors)
        assert [row["shape"] for row in rows] == [list(tensor.shape) for tensor in moved]


def test_tensors_that_autograd_or_views_know_are_stored_as_they_read():
    with torch.inference_mode():
        frozen = torch.randn(4)
    tensors = [
        torch.nn.Parameter(torch.randn(3, 3)),
        torch.randn(5, requires_grad=True) * 2,
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.tensor([True]),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        frozen,
    ]
    staging = staging_of(tensors)
    staging.stage(tensors, [])
    rows, _ = written(staging)
    assert [row["data"] for row in rows] == [bits(tensor) for tensor in tensors]
    staging.stage(tensors, [])  # no graph has grown on the slots


def test_each_save_stores_what_is_there_then():
    tensors = [torch.full((300_000,), 1.0), torch.full((3,), 2, dtype=torch.int8)]
    values = [encode_value({"step": 10**20, "name": "a longer text" * 5}, "v0"), encode_value(7, "v1")]
    staging = staging_of(tensors, values)
    staging.stage(tensors, values)
    first, _ = written(staging)
    tensors[0].fill_(5.0)
    tensors[1].fill_(6)
    values = [encode_value({"step": 1}, "v0"), encode_value(None, "v1")]
    staging.stage(tensors, values)
    second, _ = written(staging)
    assert [row["data"] for row in second[:2]] == [bits(tensor) for tensor in tensors]
    assert [decode_value(row["data"], "p", "k") for row in second[2:]] == [{"step": 1}, None]
    assert [len(row["data"]) for row in first] == [len(row["data"]) for row in second]
    assert decode_value(first[3]["data"], "p", "k") == 7


def test_a_value_that_outgrew_its_slot_is_reported():
    values = [encode_value("x" * 50, "v0")]
    staging = staging_of([], values)
    assert staging.fits([b'"' + b"y" * 60 + b'"'])
    assert not staging.fits([b'"' + b"y" * 63 + b'"'])
    with pytest.raises(ValueError, match="do not fit"):
        staging.stage([], [b"1" * 65])


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.zeros(4)],
        [torch.zeros(1), torch.zeros(4)],
        [torch.zeros(4), torch.zeros(4, dtype=torch.float64)],
        [torch.zeros(4), torch.zeros(2, 2)],
    ],
)
def test_other_tensors_than_those_laid_out_are_refused_and_not_converted(wrong):
    staging = staging_of([torch.zeros(4), torch.zeros(4)])
    with pytest.raises(ValueError):
        staging.stage(wrong, [])


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("k", "float32", (4,), (0,), (4,), 15),
        Chunk("k", "float33", (4,), (0,), (4,), 16),
        Chunk("k", "nn", (4,), (0,), (4,), 16),
    ],
)
def test_a_chunk_that_does_not_fit_together_is_refused(chunk):
    with pytest.raises(ValueError, match="k: "):
        Staging([chunk], [])


def test_values_and_their_chunks_must_match():
    with pytest.raises(ValueError):
        Staging([value_chunk("v")], [])
    with pytest.raises(ValueError):
        Staging([value_chunk("v")], [b"1", b"2"])


def test_shards_are_split_in_order():
    tensors = [torch.full((MIB // 4,), float(number)) for number in range(5)]
    staging = staging_of(tensors, [b"1"], max_shard_bytes=2 * MIB)
    assert [len(shard.image.chunks) for shard in staging.shards] == [2, 2, 2]
    staging.stage(tensors, [b"1"])
    rows, receipts = written(staging)
    assert [receipt.shard for receipt in receipts] == [0, 1, 2]
    assert [row["key"] for row in rows] == ["t0", "t1", "t2", "t3", "t4", "v0"]
    assert [row["data"] for row in rows[:5]] == [bits(tensor) for tensor in tensors]
    assert staging_of(tensors[:2], max_shard_bytes=1).shards[1].image.chunks[0].key == "t1"
    assert staging_of([]).shards == ()


# ---- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_store", [lambda path: MemoryStore(), LocalStore], ids=["memory", "local"])
@pytest.mark.parametrize("section_bytes", [MIB, 32 * MIB])
def test_large_rows_that_cross_sections_have_every_checksum_in_place(make_store, section_bytes, tmp_path):
    generator = torch.Generator().manual_seed(1)
    lengths = [10, 700_001, 3, 3, 900_000, 1, 0, 17]
    tensors = [torch.randn(length, generator=generator) for length in lengths]
    tensors.insert(3, torch.randn(512, 1031, generator=generator))
    values = [encode_value(list(range(2000)), "v0")]
    staging = staging_of(tensors, values)
    staging.stage(tensors, values)
    rows, (receipt,) = written(staging, make_store(tmp_path), section_bytes=section_bytes)
    assert [row["data"] for row in rows[:-1]] == [bits(tensor) for tensor in tensors]
    assert decode_value(rows[-1]["data"], "p", "k") == list(range(2000))
    assert len(receipt.blocks) > 4 * receipt.rows


def test_writing_again_writes_the_same_bytes():
    tensors = [torch.arange(100_000)]
    staging = staging_of(tensors)
    staging.stage(tensors, [])
    store = MemoryStore()
    receipts = [write_shard(store, f"{name}.arrow", staging.shards[0]) for name in "ab"]
    assert receipts[0] == receipts[1]
    assert store.read("a.arrow", 1 << 30) == store.read("b.arrow", 1 << 30)
    with pytest.raises(AlreadyExistsError):
        write_shard(store, "a.arrow", staging.shards[0])


def test_nothing_is_written_before_something_is_staged():
    staging = staging_of([torch.zeros(4)])
    store = MemoryStore()
    with pytest.raises(ValueError, match="staged"):
        write_shard(store, "a.arrow", staging.shards[0])
    assert not store.objects


class DisagreeingStore(MemoryStore):
    """A store whose account of what it took in is not what was sent."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def put_unique(self, path, size, sections):
        return replace(super().put_unique(path, size, sections), **self.changes)

    def stat(self, path):
        found = super().stat(path)
        return found and replace(found, **self.changes)


@pytest.mark.parametrize("changes", [{"size": 17}, {"crc32c": 17}])
def test_a_store_that_disagrees_is_not_believed(changes):
    tensors = [torch.arange(10)]
    staging = staging_of(tensors)
    staging.stage(tensors, [])
    store = DisagreeingStore(**changes)
    with pytest.raises(DamagedError, match="store holds") as caught:
        write_shard(store, "a.arrow", staging.shards[0])
    assert caught.value.path == f"{store.url}/a.arrow"


def test_a_store_without_checksums_is_no_disagreement():
    tensors = [torch.arange(10)]
    staging = staging_of(tensors)
    staging.stage(tensors, [])
    assert write_shard(DisagreeingStore(crc32c=None), "a.arrow", staging.shards[0]).rows == 1


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.one_of(st.integers(0, 50), st.integers(0, 200_000)), max_size=12), st.integers(0, 2**32 - 1))
def test_the_crc_of_a_file_follows_from_those_of_its_rows(sizes, seed):
    image = build_image([Chunk(f"k{n}", "uint8", (size,), (0,), (size,), size) for n, size in enumerate(sizes)])
    random = np.random.default_rng(seed)
    data, row_crcs = bytearray(image.size), []
    for position, text in image.fixed:
        data[position : position + len(text)] = text
    for position, size, crc_position in zip(image.positions, image.sizes, image.crc_positions, strict=True):
        data[position : position + size] = random.bytes(int(size))
        row_crcs.append(crc32c.crc32c(bytes(data[position : position + size])))
        data[crc_position : crc_position + 4] = row_crcs[-1].to_bytes(4, "little")
    assert FileCrc(image).of(np.array(row_crcs, dtype=np.uint32)) == crc32c.crc32c(bytes(data))


# ---- memory -------------------------------------------------------------------------------------------------------


def test_an_arena_is_whole_pages_of_zeros():
    arena = Arena(MIB + 1)
    assert arena.size == 2 * MIB
    assert len(arena.view) == 2 * MIB
    assert not any(arena.view)
    assert arena.tensor(0, 1).data_ptr() % 4096 == 0
    assert Arena(0).size == MIB


def test_tensors_lie_over_the_arena():
    arena = Arena(100)
    arena.tensor(3, 4).fill_(7)
    assert arena.view[2:8].tobytes() == bytes([0, 7, 7, 7, 7, 0])
    assert arena.tensor(19, 0).shape == (0,)
    for position, nbytes in [(-1, 2), (MIB - 1, 2), (5, -1)]:
        with pytest.raises(ValueError, match="not inside"):
            arena.tensor(position, nbytes)


def test_an_arena_is_in_memory_at_once_and_given_back_when_closed():
    process, size = psutil.Process(), 256 * MIB
    before = process.memory_info().rss
    arena = Arena(size)
    assert process.memory_info().rss - before > 0.9 * size
    kept = arena.tensor(0, 8)
    arena.close()
    arena.close()
    kept.fill_(1)  # a tensor keeps the memory that it lies over
    assert process.memory_info().rss - before > 0.9 * size
    del kept
    assert process.memory_info().rss - before < 0.1 * size
    with pytest.raises(ValueError, match="closed"):
        arena.tensor(0, 1)


def test_a_closed_staging_gives_its_memory_back():
    process, tensors = psutil.Process(), [torch.zeros(64 * MIB, dtype=torch.uint8) + 1]
    before = process.memory_info().rss
    staging = staging_of(tensors)
    staging.stage(tensors, [])
    assert process.memory_info().rss - before > 60 * MIB
    staging.close()
    staging.close()
    assert process.memory_info().rss - before < 30 * MIB


def test_a_forked_child_sees_zeros_does_no_harm_and_cannot_save():
    # In a process of its own: forking one that has threads is not for a test runner.
    script = """
import os, torch
from distckpt.errors import SaveError
from distckpt.format.arrow.shard import Chunk
from distckpt.transfer.arena import Arena
from distckpt.transfer.staging import Staging

def child():
    seen = bytes(arena.view[:4])
    arena.view[:4] = b"hers"
    arena.close()
    try:
        staging.stage([torch.zeros(1)], [])
    except SaveError:
        return 0 if seen == bytes(4) else 2
    return 1

arena = Arena(1 << 20)
arena.view[:4] = b"mine"
staging = Staging([Chunk("k", "float32", (1,), (0,), (1,), 4)], [])
pid = os.fork()
if pid == 0:
    os._exit(child())
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert bytes(arena.view[:4]) == b"mine"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- with a GPU ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_is_copied_from_a_gpu(name):
    flat = patterns(name).cuda()
    tensors = [flat, flat[3], flat.reshape(-1, 16).t(), patterns(name), flat[:0]]
    staging = staging_of(tensors)
    staging.stage(tensors, []).wait()
    rows, _ = written(staging)
    assert [row["data"] for row in rows] == [bits(tensor) for tensor in tensors]


@needs_gpu
def test_gpu_copies_go_into_pinned_memory_after_what_was_queued_and_before_what_is_ordered_after():
    tensor = torch.zeros(64 * MIB, device="cuda")
    staging = staging_of([tensor])
    assert staging.shards[0].pinned
    tensor.fill_(1.0)
    copied = staging.stage([tensor], [])
    copied.order_after(torch.cuda.current_stream())
    tensor.fill_(2.0)
    rows, _ = written(staging)
    assert rows[0]["data"] == np.ones(64 * MIB, dtype=np.float32).tobytes()
    staging.close()


@needs_gpu
def test_an_optimizer_that_takes_the_place_of_another_steps_after_the_copy():
    parameter = torch.nn.Parameter(torch.zeros(64 * MIB, device="cuda"))
    first, second = torch.optim.SGD([parameter]), torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    waits: list[float] = []
    order = StepOrder(lambda: [first], waits.append)
    staging = staging_of([parameter])
    order.after(staging.stage([parameter.detach()], []), [parameter.detach()])
    second.step()
    rows, _ = written(staging)
    assert rows[0]["data"] == np.zeros(64 * MIB, dtype=np.float32).tobytes()
    second.step()
    torch.cuda.synchronize()
    order.after(staging.stage([parameter.detach()], []), [parameter.detach()])
    assert len(waits) == 1
    assert waits[0] >= 0
    order.close()
    staging.close()


@needs_gpu
def test_an_arena_is_pinned_once_and_unpinned_when_closed():
    arena = Arena(MIB)
    arena.pin()
    arena.pin()
    assert arena.tensor(0, MIB).is_pinned()
    kept = arena.tensor(0, MIB)
    arena.close()
    assert not kept.is_pinned()
