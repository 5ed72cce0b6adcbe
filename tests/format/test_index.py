"""The index: made of plan and receipts, read back the same, and refused when anything in it does not add up."""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distckpt.coordinator.messages import Receipt
from distckpt.errors import DamagedError, RankFailedError, UnsupportedFormatError
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE, is_dtype
from distckpt.format.arrow.index import Index, KeyInfo, decode_index, encode_index
from distckpt.format.arrow.receipt import ShardReceipt
from tests.support.stored import Chunk, plan_table, shard_sizes, stored, value, whole, write

HALF = bytes(range(96))


def half(rank: int) -> Chunk:
    """Two ranks with three of the six rows of a float32 tensor of 6 x 8 each, in blocks of a row."""
    length = (3, 8)
    return Chunk("w", HALF[::-1] if rank else HALF, "float32", (6, 8), (3 * rank, 0), length, rank, block=32)


CHUNKS = [
    half(0),
    value("lr", b"0.1   "),
    Chunk("step", bytes(8), "int64"),
    whole("empty", b"", rank=1),
    half(1),
    value("cursor@1", b"[1,2]", rank=1, shard=3),
]


@pytest.fixture
def index() -> Index:
    return stored(CHUNKS)


def test_keys_come_in_the_order_of_writing(index: Index) -> None:
    assert index.keys() == ("w", "lr", "step", "empty", "cursor@1")
    assert len(index) == 6
    assert "lr" in index
    assert "momentum" not in index


@pytest.mark.parametrize(
    "info",
    [
        KeyInfo("w", '["w"]', "float32", (6, 8), 192, (0, 1)),
        KeyInfo("lr", '["lr"]', VALUE, (), 6, (0,)),
        KeyInfo("step", '["step"]', "int64", (), 8, (0,)),
        KeyInfo("empty", '["empty"]', "uint8", (0,), 0, (1,)),
        KeyInfo("cursor@1", '["cursor@1"]', VALUE, (), 5, (1,)),
    ],
)
def test_what_is_known_of_a_key(index: Index, info: KeyInfo) -> None:
    assert index.info(info.key) == info


def test_an_unknown_key_has_no_rows_and_no_info(index: Index) -> None:
    assert index.rows("momentum").tolist() == []
    with pytest.raises(ValueError, match="momentum"):
        index.info("momentum")


def test_columns_are_padded_to_the_most_dimensions(index: Index) -> None:
    rows = index.rows("w")
    assert rows.tolist() == [0, 4]
    assert index.offset[rows].tolist() == [[0, 0], [3, 0]]
    assert index.length[rows].tolist() == [[3, 8], [3, 8]]
    assert index.shapes[index.key[1:4]].tolist() == [[1, 1], [1, 1], [0, 1]]
    assert index.rank.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.shard.tolist() == [0, 0, 0, 0, 0, 3]
    assert index.size.tolist() == [96, 6, 8, 0, 96, 5]
    assert index.block.tolist() == [32, 6, 8, 1, 32, 5]


def test_blocks_are_those_of_the_receipts(index: Index) -> None:
    ordered = [half(0), CHUNKS[1], CHUNKS[2], CHUNKS[3], half(1), CHUNKS[5]]
    for row, chunk in enumerate(ordered):
        assert index.blocks[index.starts[row] : index.starts[row + 1]].tolist() == chunk.running


def test_it_opens_in_plain_pyarrow() -> None:
    table = pa.ipc.open_file(pa.py_buffer(encode_index(plan_table(CHUNKS), write(CHUNKS)))).read_all()
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["key"], first["dtype"], first["shape"], first["length"]) == ("w", "float32", [6, 8], [3, 8])
    assert first["crc32c"] == first["blocks"][-1] == half(0).running[-1]
    assert table.schema.metadata == {b"distckpt.format": b"1"}


def test_a_checkpoint_of_nothing_has_an_index() -> None:
    schema = plan_table(CHUNKS).schema
    index = decode_index(encode_index(schema.empty_table(), {0: Receipt("a", ())}), "index.arrow", {})
    assert (len(index), index.keys()) == (0, ())


def test_an_index_of_no_rows_may_have_lists_without_any_offset() -> None:
    """Arrow allows that, and checks it."""
    schema = plan_table([value("lr", b"1")]).schema
    data = encode_index(schema.empty_table(), {0: Receipt("a", ())})
    length = struct.pack("<q", 4)  # of a buffer of one offset, in the file's metadata
    places = [at for at in range(0, len(data) - 8, 8) if data[at : at + 8] == length]
    assert len(places) >= 4
    for place in places:
        changed = data[:place] + bytes(8) + data[place + 8 :]
        try:
            assert len(decode_index(changed, "index.arrow", {})) == 0
        except DamagedError:
            continue


def test_dictionary_columns_and_many_chunks_make_no_difference() -> None:
    table = plan_table(CHUNKS)
    parts = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    for name in ("key", "path", "dtype"):
        place = parts.schema.get_field_index(name)
        parts = parts.set_column(place, name, parts.column(name).dictionary_encode())
    # A sliced dictionary keeps texts that no row uses; they must not become keys.
    assert encode_index(parts, write(CHUNKS)) == encode_index(table, write(CHUNKS))


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: getattr(torch, name).itemsize for name in ITEM_SIZES} == dict(ITEM_SIZES)
    assert is_dtype(VALUE)
    assert not is_dtype("object")


def test_rows_of_a_thousand_ranks_cost_no_python_each() -> None:
    ranks, keys = 1024, 300
    table, receipts = _large(ranks, keys)
    with _Calls() as encoding:
        data = encode_index(table, receipts)
    with _Calls() as decoding:
        index = decode_index(data, "index.arrow", shard_sizes(receipts))
    assert 0 < encoding.count < 30 * ranks
    assert 0 < decoding.count < 30 * ranks
    assert len(index) == ranks * keys
    everyone = tuple(range(ranks))
    assert index.info("k7") == KeyInfo("k7", '["k7"]', "float32", (7168 * ranks,), 7168 * 4 * ranks, everyone)


class _Calls:
    """How many functions are called inside, C's among them."""

    count = 0

    def __enter__(self) -> _Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event in ("call", "c_call")


def _large(ranks: int, keys: int) -> tuple[pa.Table, dict[int, Receipt]]:
    """Every rank holds its part of every key: 1024 to 8192 float32 elements in blocks of 8 KiB."""
    rank, key = np.repeat(np.arange(ranks), keys), np.tile(np.arange(keys), ranks)
    elements = (np.arange(keys) % 8 + (np.arange(keys) % 8 == 0)) * 1024
    names = pa.DictionaryArray.from_arrays(pa.array(key, pa.int32()), [f"k{n}" for n in range(keys)])
    paths = pa.DictionaryArray.from_arrays(pa.array(key, pa.int32()), [f'["k{n}"]' for n in range(keys)])
    boxes = {"shape": elements[key] * ranks, "offset": elements[key] * rank, "length": elements[key]}
    ends = np.arange(len(key) + 1, dtype=np.int32)
    table = pa.table(
        {
            "key": names.cast(pa.utf8()),
            "path": paths.cast(pa.utf8()),
            "dtype": ["float32"] * len(key),
            **{name: pa.ListArray.from_arrays(ends, box) for name, box in boxes.items()},
            "rank": rank,
            "nbytes": elements[key] * 4,
        }
    )
    sizes = elements * 4
    blocks = np.arange(int(np.maximum(1, sizes // 8192 + (sizes % 8192 > 0)).sum()), dtype="<u4")
    part = ShardReceipt(
        shard=0,
        size=int(sizes.sum()),
        crc32c=0,
        rows=keys,
        positions=(np.cumsum(sizes) - sizes).astype("<i8").tobytes(),
        sizes=sizes.astype("<i8").tobytes(),
        block_sizes=np.full(keys, 8192, "<i8").tobytes(),
        blocks=blocks.tobytes(),
    )
    return table, {number: Receipt("a", (part,)) for number in range(ranks)}


# ---- receipts that do not fit ---------------------------------------------------------------------------------------


def int64s(*numbers: int) -> bytes:
    return np.array(numbers, "<i8").tobytes()


def changed_part(**fields: Any) -> dict[int, Receipt]:
    """The receipts, with the first shard of rank 1 (rows: empty, w) changed."""
    receipts = write(CHUNKS)
    first, *others = receipts[1].shards
    part = dataclasses.replace(first, **fields)
    return {**receipts, 1: dataclasses.replace(receipts[1], shards=(part, *others))}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rows": 3}, "other lengths than its 3 rows"),
        (dict.fromkeys(["positions", "sizes", "block_sizes"], int64s(0)) | {"rows": 1}, "2 rows, and the plan .* 3"),
        ({"sizes": int64s(0, 92)}, "row 4 of the plan: 92 bytes long, and the plan says 96"),
        ({"sizes": int64s(0, -1)}, "row 4 of the plan: its size is out of bounds"),
        ({"sizes": int64s(96, 96)}, "row 3 of the plan: 96 bytes long, and the plan says 0"),
        ({"positions": int64s(8, -8)}, "its position is out of bounds"),
        ({"positions": int64s(8, 1 << 40)}, "its bytes lie outside its shard"),
        ({"positions": int64s(8, (1 << 63) - 1)}, "its position is out of bounds"),
        ({"size": 100}, "its bytes lie outside its shard"),
        ({"block_sizes": int64s(1, 0)}, "its block size is out of bounds"),
        ({"block_sizes": int64s(1, 31)}, "4 block CRCs, not 5"),
        ({"blocks": bytes(12)}, "3 block CRCs, not 4"),
        ({"blocks": bytes(17)}, "4.25 block CRCs, not 4"),
        ({"shard": -1}, "its shard is out of bounds"),
        ({"shard": 3}, "lists shard 3 twice"),
    ],
)
def test_a_receipt_that_does_not_fit_names_the_rank(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RankFailedError, match=reason) as caught:
        encode_index(plan_table(CHUNKS), changed_part(**fields), number=42, hosts={1: "node-b"})
    assert (caught.value.rank, caught.value.host, caught.value.number) == (1, "node-b", 42)


def test_rows_that_overlap_in_a_shard_name_the_rank() -> None:
    chunks = [whole("a", b"x" * 100, rank=2), whole("b", b"y" * 100, rank=2)]
    receipts = write(chunks)
    part = receipts[2].shards[0]
    first = np.frombuffer(part.positions, "<i8")[0]
    part = dataclasses.replace(part, positions=int64s(int(first), int(first) + 99))
    with pytest.raises(RankFailedError, match="lie over those of another row") as caught:
        encode_index(plan_table(chunks), {2: dataclasses.replace(receipts[2], shards=(part,))})
    assert caught.value.rank == 2


def test_a_rank_without_a_receipt_is_named() -> None:
    receipts = write(CHUNKS)
    del receipts[1]
    with pytest.raises(RankFailedError, match="0 rows, and the plan gives it 3") as caught:
        encode_index(plan_table(CHUNKS), receipts)
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table.take([4, 0, 1, 2, 3, 5]),
        lambda table: table.set_column(0, "key", pa.array([None, *table.column("key").to_pylist()[1:]])),
        lambda table: table.set_column(1, "dtype", pa.array(["object", "json", "int64", "uint8", "object", "json"])),
        lambda table: table.set_column(3, "shape", pa.array([[6, 8], [], [], [0], [6, 9], []], pa.list_(pa.int64()))),
    ],
    ids=["order", "null", "dtype", "shapes that differ"],
)
def test_a_plan_that_no_reader_would_accept_is_refused_at_once(spoil: Callable[[pa.Table], pa.Table]) -> None:
    table = plan_table(CHUNKS)
    assert table.schema.names[:4] == ["key", "dtype", "rank", "shape"]
    with pytest.raises(ValueError, match=r"plan|index"):
        encode_index(spoil(table), write(CHUNKS))


# ---- damage ---------------------------------------------------------------------------------------------------------


def encoded() -> bytes:
    return encode_index(plan_table(CHUNKS), write(CHUNKS))


def test_every_cut_is_found() -> None:
    data = encoded()
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            decode_index(data[:length], "index.arrow")


def test_flipped_bytes_never_raise_anything_else() -> None:
    """The manifest's digest finds all of them first; a forger fixes the digest, and must still get no further."""
    data = bytearray(encoded())
    sizes = shard_sizes(write(CHUNKS))
    found = 0
    for position in range(len(data)):
        flip = (0x01, 0x80, 0xFF)[position % 3]
        data[position] ^= flip
        try:
            decode_index(bytes(data), "index.arrow", sizes)
        except DamagedError:
            found += 1
        data[position] ^= flip
    assert found > len(data) // 4


def test_a_newer_format_is_named() -> None:
    batch = pa.ipc.open_file(pa.py_buffer(encoded())).get_batch(0)
    data = rewritten(batch.replace_schema_metadata({"distckpt.format": "9"}))
    with pytest.raises(UnsupportedFormatError, match="format version 9, and this release reads version 1"):
        decode_index(data, "index.arrow")


def rewritten(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_shard_sizes_are_held_against_the_rows() -> None:
    sizes = shard_sizes(write(CHUNKS))
    decode_index(encoded(), "index.arrow", sizes)
    with pytest.raises(DamagedError, match="key 'cursor@1': row 5: its shard is not one of the checkpoint's"):
        decode_index(encoded(), "index.arrow", {shard: size for shard, size in sizes.items() if shard != (1, 3)})
    with pytest.raises(DamagedError, match="key 'empty': row 3: its shard is not one of the checkpoint's"):
        decode_index(encoded(), "index.arrow", {shard: size for shard, size in sizes.items() if shard != (1, 0)})
    with pytest.raises(DamagedError, match="key 'cursor@1': row 5: its bytes lie outside its shard"):
        decode_index(encoded(), "index.arrow", {**sizes, (1, 3): 10})
