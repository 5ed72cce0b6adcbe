"""Shards: the image laid out before any payload exists is, once filled, a plain Arrow file with the right content."""

from __future__ import annotations

import math
import mmap
import struct

import crc32c
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distckpt.format.arrow.shard import MAP_NORESERVE, SCHEMA, Chunk, block_size, build_image
from tests.support.part import examples
from tests.support.shards import rows_of

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def byte_chunk(name, nbytes):
    return Chunk(f"model.{name}", "uint8", (nbytes + 5,), (2,), (nbytes,), nbytes)


def payload_of(number, nbytes):
    pattern = bytes((number * 37 + index) % 251 for index in range(min(nbytes, 1009)))
    return (pattern * (nbytes // max(1, len(pattern)) + 1))[:nbytes]


def finish(image):
    """The file: every payload and CRC in its place."""
    data = bytearray(image.size)
    for position, text in image.fixed:
        data[position : position + len(text)] = text
    places = zip(image.positions.tolist(), image.sizes.tolist(), image.crc_positions.tolist(), strict=True)
    for number, (position, size, crc_position) in enumerate(places):
        payload = payload_of(number, size)
        data[position : position + size] = payload
        struct.pack_into("<I", data, crc_position, crc32c.crc32c(payload))
    return bytes(data)


def expected(chunks):
    return [
        {
            "key": chunk.key,
            "dtype": chunk.dtype,
            "shape": list(chunk.shape),
            "offset": list(chunk.offset),
            "length": list(chunk.length),
            "crc32c": crc32c.crc32c(payload_of(number, chunk.nbytes)),
            "data": payload_of(number, chunk.nbytes),
        }
        for number, chunk in enumerate(chunks)
    ]


def check_cover(image):
    """Fixed bytes and payloads cover the file exactly, each byte once."""
    parts = [(position, len(text)) for position, text in image.fixed]
    parts += [
        (position, size) for position, size in zip(image.positions.tolist(), image.sizes.tolist(), strict=True) if size
    ]
    end = 0
    for position, size in sorted(parts):
        assert position == end
        end += size
    assert end == image.size


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 40), st.integers(64 * KIB - 9, 64 * KIB + 9), st.integers(0, 300 * KIB)), max_size=30
    )
)
@example([])
@example([0])
@example([1])
@example([0, 0, 0])
@example([13, 0, 200 * KIB + 3, 0, 1])
@example([63 * KIB] * 40)
def test_a_finished_image_is_a_plain_arrow_file(sizes):
    chunks = [byte_chunk(number, size) for number, size in enumerate(sizes)]
    image = build_image(chunks)
    check_cover(image)
    data = finish(image)
    table = pa.ipc.open_file(data).read_all()
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.to_pylist() == expected(chunks)
    assert pa.ipc.open_stream(data[8:]).read_all().equals(table)


def test_every_kind_of_chunk():
    chunks = [
        Chunk("model.weight", "bfloat16", (6, 8), (2, 0), (3, 8), 48),
        Chunk("scale", "float8_e4m3fn", (), (), (), 1),
        Chunk("optimizer.param_groups", "json", (), (), (), 128),
        Chunk("empty", "complex128", (0, 4), (0, 0), (0, 4), 0),
        Chunk("größe.\U0001f600", "int64", (2,), (0,), (2,), 16),
    ]
    assert rows_of(finish(build_image(chunks))) == expected(chunks)


def test_small_chunks_share_batches_and_large_ones_do_not():
    def rows_per_batch(sizes):
        reader = pa.ipc.open_file(finish(build_image([byte_chunk(n, size) for n, size in enumerate(sizes)])))
        return [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]

    assert rows_per_batch([10] * 1000) == [1000]
    assert rows_per_batch([10, 10, 64 * KIB, 10, 10]) == [2, 1, 2]
    assert rows_per_batch([64 * KIB] * 3) == [1, 1, 1]
    assert rows_per_batch([60 * KIB] * 40) == [17, 17, 6]
    assert rows_per_batch([]) == []


def test_a_thousand_large_chunks():
    chunks = [byte_chunk(number, 64 * KIB + number) for number in range(1000)]
    image = build_image(chunks)
    check_cover(image)
    assert rows_of(finish(image)) == expected(chunks)


def test_payloads_begin_at_multiples_of_eight_and_crcs_never_straddle():
    image = build_image([byte_chunk(number, 64 * KIB + number) for number in range(20)])
    assert not (image.positions % 8).any()
    image = build_image([byte_chunk(number, number) for number in range(300)])
    assert not (image.crc_positions % 4).any()
    assert (image.crc_positions < image.positions).all()
    assert (image.crc_positions[1:] > image.crc_positions[:-1]).all()


def test_sizes_beyond_four_gib_need_no_memory():
    sizes = [3 * GIB + 1, 5, 7, 5 * GIB, 2 * GIB]
    image = build_image([byte_chunk(number, size) for number, size in enumerate(sizes)])
    check_cover(image)
    assert sum(len(text) for _, text in image.fixed) < 10 * KIB
    addresses = mmap.mmap(-1, image.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    for position, text in image.fixed:
        addresses[position : position + len(text)] = text
    file = pa.py_buffer(addresses)
    columns = pa.ipc.open_file(file).read_all().column("data").chunks
    offsets, payloads = zip(*(column.buffers()[1:] for column in columns), strict=True)
    assert [payload.address - file.address for payload in payloads] == image.positions[[0, 1, 3, 4]].tolist()
    ends = [np.frombuffer(each, dtype=np.int64).tolist() for each in offsets]
    assert ends == [[0, sizes[0]], [0, 5, 12], [0, sizes[3]], [0, sizes[4]]]


def test_an_impossible_chunk_is_refused():
    with pytest.raises(ValueError, match="negative"):
        build_image([byte_chunk("a", 5), Chunk("b", "uint8", (1,), (0,), (1,), -1)])
    with pytest.raises(ValueError, match="surrogate"):
        build_image([byte_chunk("\ud800", 5)])


# ---- blocks -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 40 * MIB))
def test_blocks_are_few_not_tiny_and_made_of_whole_rows(rows, row_nbytes):
    nbytes = rows * row_nbytes
    block = block_size(nbytes, row_nbytes)
    assert 1 <= block <= nbytes
    assert math.ceil(nbytes / block) <= 64
    assert block >= 64 * KIB or block == nbytes
    assert block % row_nbytes == 0 or block == nbytes or row_nbytes % block == 0


@pytest.mark.parametrize(
    ("nbytes", "row_nbytes", "block"),
    [
        (0, 0, 1),
        (64, 0, 64),
        (10 * MIB, 0, 10 * MIB),
        (64 * KIB - 4, 4, 64 * KIB - 4),
        (64 * KIB, 4, 64 * KIB),
        (4096 * 4 * KIB, 4 * KIB, 64 * 4 * KIB),
        (12288 * 16 * KIB, 16 * KIB, 192 * 16 * KIB),
        (50257 * 3072, 3072, 1024 * 3072),
        (512 * 3000, 3000, 32 * 3000),
        (8 * GIB, GIB, GIB // 8),
        (2 * 65 * KIB * 2, 65 * KIB * 2, 65 * KIB),
        (3 * (128 * KIB + 4), 128 * KIB + 4, 128 * KIB + 4),
    ],
)
def test_block_sizes_divide_what_is_usually_divided(nbytes, row_nbytes, block):
    assert block_size(nbytes, row_nbytes) == block


def test_block_sizes_of_an_image_follow_the_first_dimension():
    chunks = [
        Chunk("w", "float32", (4096, 1024), (0, 0), (2048, 1024), 8 * MIB),
        Chunk("b", "float32", (9,), (0,), (9,), 36),
        Chunk("v", "json", (), (), (), 1 * MIB),
        Chunk("s", "int64", (), (), (), 8),
        Chunk("e", "int64", (0,), (0,), (0,), 0),
    ]
    assert build_image(chunks).block_sizes.tolist() == [128 * KIB, 36, MIB, 8, 1]
