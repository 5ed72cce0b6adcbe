"""Files made to do harm, with every checksum right: each must be refused with a typed error, cheaply.

Whoever can write to the store can delete a checkpoint; they must not be able to do anything worse than that.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pytest

from distckpt.errors import DamagedError, UnsupportedFormatError
from distckpt.format.arrow.index import decode_index, encode_index
from distckpt.format.json.log import Entry
from distckpt.format.json.manifest import MAX_MANIFEST_BYTES, Manifest
from distckpt.format.json.sealed import unseal
from tests.support.sealed import ENTRY, MANIFEST, plain, resealed
from tests.support.stored import Chunk, plan_table, shard_sizes, value, whole, write

# ---- manifest and log entry -----------------------------------------------------------------------------------------


def open_manifest(data: bytes) -> None:
    unseal(data, Manifest, "manifest.json", MAX_MANIFEST_BYTES)


def open_entry(data: bytes) -> Entry:
    return unseal(data, Entry, "_log/9.json", MAX_MANIFEST_BYTES)


CLIMBING = ["..", "../../home", "/etc", "/", "a/b", "a\\b", "a\0b", ".hidden", "", "a\n", "gs://b", "x" * 129, "é"]


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("field", ["name", "attempt"])
def test_names_that_climb_out_of_the_directory(field: str, name: str) -> None:
    with pytest.raises(DamagedError, match="is not a"):
        open_manifest(resealed({**plain(MANIFEST), field: name}))
    record = {**plain(ENTRY)["state"]["active"][1], field: name}
    for place in ("active", "preserved", "retiring"):
        with pytest.raises(DamagedError, match="is not a"):
            open_entry(resealed({**plain(ENTRY), "state": {place: [record]}}))


@pytest.mark.parametrize("name", CLIMBING)
def test_a_hostile_name_is_quoted_and_cut_in_the_message(name: str) -> None:
    with pytest.raises(DamagedError) as caught:
        open_manifest(resealed({**plain(MANIFEST), "name": name}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


HUGE = [-1, 10**18, 1 << 63, 1 << 64, 10**4000]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["number", "epoch", "world_size", "index_crc32c"])
def test_absurd_numbers_in_a_manifest(field: str, number: int) -> None:
    with pytest.raises(DamagedError):
        open_manifest(resealed({**plain(MANIFEST), field: number}))


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["seq", "epoch"])
def test_absurd_numbers_in_an_entry(field: str, number: int) -> None:
    with pytest.raises(DamagedError):
        open_entry(resealed({**plain(ENTRY), field: number}))


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["rank", "shard", "crc32c"])
def test_absurd_numbers_of_a_shard(field: str, number: int) -> None:
    shard = {"rank": 0, "shard": 0, "size": 1, "crc32c": 1, field: number}
    with pytest.raises(DamagedError):
        open_manifest(resealed({**plain(MANIFEST), "shards": [shard]}))


@pytest.mark.parametrize("time_text", [b"1e999", b"NaN", b"Infinity", b"-1e400", b'"now"', b"null"])
def test_times_that_are_no_numbers(time_text: bytes) -> None:
    body = resealed(plain(MANIFEST)).rpartition(b',"crc32c":"')[0]
    body = body.replace(b'"time":1700000000.0', b'"time":' + time_text)
    assert time_text in body
    with pytest.raises(DamagedError):
        open_manifest(sealed(body))


def sealed(body: bytes) -> bytes:
    return body + b',"crc32c":"%08x"}\n' % crc32c.crc32c(body)


@pytest.mark.parametrize("version", [0, 2, 10**30, -1, "1", None, [1], 1.0, True])
def test_unknown_versions(version: object) -> None:
    with pytest.raises(UnsupportedFormatError, match="and this release reads version 1"):
        open_manifest(resealed({**plain(MANIFEST), "format": version}))
    with pytest.raises(UnsupportedFormatError):
        open_entry(resealed({**plain(ENTRY), "format": version}))


NESTED = {
    "lists": b'{"format":1,"shards":' + b"[" * 100_000,
    "objects": b'{"format":1,"shards":' + b'{"a":' * 100_000,
    "behind a quote": b'{"format":1,"name":"\\\\\\"[[","shards":' + b"[" * 100_000,
    "behind a backslash": b'{"format":1,"name":"\\\\","shards":' + b"[" * 100_000,
    "in an unknown field": b'{"format":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "before the version": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"format":1}',
    "just too deep": b'{"format":1,"x":' + b"[" * 16 + b"]" * 16 + b"}",
}


@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED)
def test_deep_nesting(body: bytes) -> None:
    for data in (body, sealed(body)):
        with pytest.raises(DamagedError, match="nested deeper than 16 levels"):
            open_manifest(data)


@pytest.mark.parametrize("text", ["[" * 100, "{" * 100, '"[[[' * 30, "\\[" * 50, '\\"[' * 50])
def test_brackets_inside_a_text_are_no_nesting(text: str) -> None:
    members = plain(ENTRY)
    members["state"]["active"][1]["metrics"] = {text: 0.5}
    assert open_entry(resealed(members)).state.active[1].metrics == {text: 0.5}


@pytest.mark.parametrize(
    "body",
    [b"\xff" * 64, b'{"format":1,"name":"\xff"', b'{"format":1,"name":"\\ud800"', b"[1]", b"1", b"null", b"{}", b""],
)
def test_what_is_no_object_of_ours(body: bytes) -> None:
    for data in (body, sealed(body)):
        with pytest.raises(DamagedError):
            open_manifest(data)


@pytest.mark.parametrize("filling", [b'"', b"\\", b"[", b"{", b"1", b" ", b'"\\'])
def test_the_largest_file_is_refused_in_bounded_time(filling: bytes) -> None:
    data = sealed(b'{"format":1,"name":"' + (filling * (16 << 20))[: 16 << 20])
    began = time.process_time()
    with pytest.raises(DamagedError):
        open_manifest(data)
    assert time.process_time() - began < 5


def test_the_same_member_twice_cannot_show_two_faces() -> None:
    """Version and record come from the same occurrence, so what was checked is what is used."""
    body = resealed(plain(MANIFEST)).rpartition(b',"crc32c":"')[0]
    with pytest.raises(UnsupportedFormatError):
        open_manifest(sealed(body + b',"format":2'))
    with pytest.raises(DamagedError, match="not a checkpoint name"):
        open_manifest(sealed(body + b',"name":"../up"'))


# ---- index ----------------------------------------------------------------------------------------------------------

CHUNKS = [
    Chunk("w", bytes(96), "float32", (6, 8), (0, 0), (3, 8), block=32),
    Chunk("w", bytes(96), "float32", (6, 8), (3, 0), (3, 8), block=32),
    value("lr", b"0.1"),
    whole("b", bytes(10), rank=1),
]


def honest() -> pa.RecordBatch:
    return pa.ipc.open_file(pa.py_buffer(encode_index(plan_table(CHUNKS), write(CHUNKS)))).get_batch(0)


def forged(batch: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def with_column(name: str, column: pa.Array) -> bytes:
    batch = honest()
    return forged(batch.set_column(batch.schema.get_field_index(name), name, column))


def with_values(name: str, values: list[Any]) -> bytes:
    kind = honest().schema.field(name).type
    if pa.types.is_dictionary(kind):
        return with_column(name, pa.array(values, pa.utf8()).dictionary_encode())
    return with_column(name, pa.array(values, kind))


def refuse(data: bytes, reason: str) -> DamagedError:
    with pytest.raises(DamagedError, match=reason) as caught:
        decode_index(data, "index.arrow", shard_sizes(write(CHUNKS)))
    assert caught.value.path == "index.arrow"
    return caught.value


def test_an_honest_index_passes_this_way_too() -> None:
    assert len(decode_index(forged(honest()), "index.arrow", shard_sizes(write(CHUNKS)))) == 4


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("rank", [-1, 0, 0, 1], "rank is out of bounds"),
        ("rank", [0, 0, 0, 1 << 20], "rank is out of bounds"),
        ("rank", [0, 0, 0, 7], "shard is not one of"),
        ("shard", [-1, 0, 0, 0], "shard is out of bounds"),
        ("shard", [0, 0, 0, (1 << 31) - 1], "shard is out of bounds"),
        ("shard", [0, 0, 0, 1], "shard is not one of"),
        ("position", [-8, 0, 0, 0], "position is out of bounds"),
        ("position", [0, 0, 0, (1 << 63) - 1], "position is out of bounds"),
        ("position", [400, 500, 700, 1 << 60], "outside its shard"),
        ("position", [500, 500, 700, 700], "lie over those of another row"),
        ("position", [500, 400, 495, 700], "lie over those of another row"),
        ("size", [96, 96, -1, 10], "size is out of bounds"),
        ("size", [96, 96, 3, 1 << 59], "its size is not what its elements take"),
        ("size", [96, 92, 3, 10], "its size is not what its elements take"),
        ("size", [96, 96, 1 << 59, 10], "its number of blocks is wrong"),
        ("block", [0, 32, 3, 10], "block size is out of bounds"),
        ("block", [-1, 32, 3, 10], "block size is out of bounds"),
        ("block", [31, 32, 3, 10], "number of blocks is wrong"),
        ("block", [1, 32, 3, 10], "number of blocks is wrong"),
        ("crc32c", [1, 2, 3, 4], "not that of its last block"),
        ("blocks", [[], [], [], []], "number of blocks is wrong"),
        ("blocks", [[1, 2], [1, 2, 3], [1], [1]], "number of blocks is wrong"),
        ("offset", [[0, 0], [3, 1], [], [0]], "its chunk lies outside the tensor"),
        ("offset", [[0, 0], [-3, 0], [], [0]], "out of bounds"),
        ("offset", [[0, 0], [(1 << 63) - 1, 0], [], [0]], "its chunk lies outside the tensor"),
        ("offset", [[0, 0], [3], [], [0]], "differ in dimensions"),
        ("length", [[3, 8], [4, 8], [], [10]], "its chunk lies outside the tensor"),
        ("length", [[3, 8], [3, -8], [], [10]], "out of bounds"),
        ("length", [[3, 8], [(1 << 63) - 1, 8], [], [10]], "its chunk lies outside the tensor"),
        ("length", [[3, 8], [3, 7], [], [10]], "its size is not what its elements take"),
        ("shape", [[6, 8], [6, 9], [], [10]], "disagrees with others"),
        ("shape", [[1 << 30, 8], [1 << 30, 8], [], [10]], "not as many bytes as the tensor"),
        ("shape", [[-6, 8], [-6, 8], [], [10]], "out of bounds"),
        ("shape", [[1 << 40, 1 << 40]] * 2 + [[], [10]], "more bytes than can exist"),
        ("dtype", ["float32", "int32", "json", "uint8"], "disagrees with others"),
        ("dtype", ["float32", "float32", "json", "object"], "'object' is not an element type"),
        ("dtype", ["float32", "float32", "json", "json"], "a plain value with dimensions"),
        ("path", ["w", "v", "lr", "b"], "disagrees with others"),
        ("key", ["w", "lr", "lr", "b"], "disagrees with others"),
        ("key", ["w", None, "lr", "b"], "has nulls"),
        ("position", [None, 400, 500, 700], "has nulls"),
        ("shape", [[6, None], [6, 8], [], [10]], "has nulls"),
        ("shape", [None, [6, 8], [], [10]], "has nulls"),
        ("blocks", [[1, 2, None], [1, 2, 3], [1], [1]], "has nulls"),
    ],
)
def test_rows_that_lie(name: str, values: list[Any], reason: str) -> None:
    refuse(with_values(name, values), reason)


def test_the_key_that_is_hurt_is_named() -> None:
    assert refuse(with_values("size", [96, 92, 3, 10]), "row 1").key == "w"


def test_too_many_dimensions() -> None:
    many = [[1] * 33, [1] * 33, [], [10]]
    batch = honest()
    for name in ("shape", "offset", "length"):
        batch = batch.set_column(batch.schema.get_field_index(name), name, pa.array(many, pa.list_(pa.int64())))
    refuse(forged(batch), "more than 32 dimensions")


def test_shapes_whose_product_overflows_in_every_way() -> None:
    for shape in ([1 << 60] * 32, [0] + [1 << 60] * 31, [1 << 32, 1 << 32, 0]):
        chunk = pa.array([shape] * 2 + [[], [10]], pa.list_(pa.int64()))
        start = pa.array([[0] * len(shape)] * 2 + [[], [0]], pa.list_(pa.int64()))
        batch = honest()
        for name, column in (("shape", chunk), ("length", chunk), ("offset", start)):
            batch = batch.set_column(batch.schema.get_field_index(name), name, column)
        refuse(forged(batch), "more bytes than can exist|not what its elements take")


def dictionary(indices: list[int], values: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), values, safe=False)


def test_dictionaries_that_lie() -> None:
    refuse(with_column("key", dictionary([0, 0, 1, 9], ["w", "lr", "b"])), "not a sound Arrow file")
    refuse(with_column("key", dictionary([0, 0, 1, -1], ["w", "lr", "b"])), "not a sound Arrow file")
    refuse(with_column("key", dictionary([0, 1, 2, 3], ["w", "w", "lr", "b"])), "lists a key twice")
    refuse(with_column("key", dictionary([0, 0, 1, 2], ["w", "lr", "b", "ghost"])), "has no rows")


class Trap(pa.ExtensionType):
    """An extension type whose reading would run its own code."""

    revived = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "distckpt.test.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Trap:
        cls.revived += 1
        return cls()


def test_an_extension_type_is_refused_before_arrow_revives_it() -> None:
    pa.register_extension_type(Trap())
    try:
        batch = honest()
        position = pa.ExtensionArray.from_storage(Trap(), batch.column("position"))
        data = forged(batch.set_column(batch.schema.get_field_index("position"), "position", position))
        Trap.revived = 0
        refuse(data, "Arrow extension type")
        assert Trap.revived == 0
    finally:
        pa.unregister_extension_type("distckpt.test.trap")


def test_an_unregistered_extension_type() -> None:
    batch = honest()
    place = batch.schema.get_field_index("position")
    field = pa.field("position", pa.int64(), metadata={"ARROW:extension:name": "x", "ARROW:extension:metadata": "y"})
    refuse(forged(pa.record_batch(batch.columns, schema=batch.schema.set(place, field))), "Arrow extension type")


TYPES: dict[str, Callable[[pa.RecordBatch], pa.Array]] = {
    "dictionary numbers": lambda batch: batch.column("position").dictionary_encode(),
    "plain text": lambda batch: batch.column("key").cast(pa.utf8()),
    "large text": lambda batch: batch.column("key").cast(pa.large_utf8()),
    "narrow indices": lambda batch: batch.column("key").cast(pa.dictionary(pa.int8(), pa.utf8())),
    "binary": lambda batch: batch.column("key").cast(pa.utf8()).cast(pa.binary()),
    "float": lambda batch: batch.column("position").cast(pa.float64()),
    "struct": lambda batch: pa.StructArray.from_arrays([batch.column("position")], ["x"]),
    "view": lambda batch: batch.column("key").cast(pa.utf8()).cast(pa.string_view()),
    "null": lambda batch: pa.nulls(4),
    "run ends": lambda batch: pa.RunEndEncodedArray.from_arrays([4], [1]),
    "union": lambda batch: pa.UnionArray.from_sparse(pa.array([0] * 4, pa.int8()), [batch.column("position")]),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["key", "position", "shape"])
def test_types_that_an_index_does_not_have(name: str, kind: str) -> None:
    refuse(with_column(name, TYPES[kind](honest())), "columns are not those of an index|batches or dictionaries")


def test_columns_that_an_index_does_not_have() -> None:
    batch = honest()
    refuse(forged(batch.append_column("url", pa.array(["file:///etc"] * 4))), "columns are not those of an index")
    refuse(forged(batch.select(batch.schema.names[::-1])), "columns are not those of an index")
    refuse(forged(batch.select(batch.schema.names[:-1])), "columns are not those of an index")
    more = {**batch.schema.metadata, b"pandas": b"{}"}
    refuse(forged(batch.replace_schema_metadata(more)), "columns are not those of an index")
    refuse(forged(batch.replace_schema_metadata(None)), "columns are not those of an index")


@pytest.mark.parametrize("version", ["0", "2", "1 ", "", "x" * 1000])
def test_unknown_versions_of_an_index(version: str) -> None:
    batch = honest().replace_schema_metadata({"distckpt.format": version})
    with pytest.raises(UnsupportedFormatError, match="this release reads version 1"):
        decode_index(forged(batch), "index.arrow")


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_decompression_bomb_is_not_opened(codec: str) -> None:
    rows = 4_000_000
    batch = honest()
    zeros = np.zeros(rows, np.int64)
    column = pa.array(zeros)
    text = pa.DictionaryArray.from_arrays(pa.array(zeros, pa.int32()), ["w"])
    empty = pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1), pa.int32()), pa.array([], pa.int64()))
    bomb = {
        "key": text,
        "path": text,
        "dtype": text,
        **dict.fromkeys(["shape", "offset", "length"], empty),
        **{name: column.cast(batch.schema.field(name).type) for name in batch.schema.names[6:12]},
        "blocks": empty.cast(pa.list_(pa.uint32())),
    }
    data = forged(pa.record_batch(list(bomb.values()), schema=batch.schema), compression=codec)
    assert len(data) < 2_000_000
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        refuse(data, "buffers are compressed")
    finally:
        pa.set_memory_pool(usual)
    assert (pool.max_memory() or 0) < 1 << 20


def test_compression_as_the_first_arrow_versions_announced_it() -> None:
    """Plain buffers that claim to be compressed: Arrow would believe it."""
    batch = honest()
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    data = sink.getvalue()
    with pytest.raises((pa.ArrowException, OSError)):
        pa.ipc.open_file(data).get_batch(0)
    refuse(data.to_pybytes(), "metadata of its own")


def test_a_compressed_dictionary_is_not_opened_either() -> None:
    batch = honest()
    refuse(_grafted(forged(batch), forged(batch, compression="zstd")), "buffers are compressed")
    assert len(decode_index(_grafted(forged(batch), forged(batch)), "index.arrow")) == 4


def _grafted(honest_file: bytes, other_file: bytes) -> bytes:
    """An honest file whose footer's first dictionary is that of another file, put before its footer."""
    start = _footer_start(honest_file)
    footer = bytearray(honest_file[start:])
    here, there = _first_dictionary(honest_file), _first_dictionary(other_file)
    offset, metadata, body = struct.unpack("<qi4xq", other_file[there : there + 24])
    block = other_file[offset : offset + metadata + body]
    padding = bytes(-start % 8)
    footer[here - start : here - start + 24] = struct.pack("<qi4xq", start + len(padding), metadata, body)
    return honest_file[:start] + padding + block + bytes(footer)


def _footer_start(data: bytes) -> int:
    (length,) = struct.unpack("<i", data[-10:-6])
    return len(data) - 10 - int(length)


def _first_dictionary(data: bytes) -> int:
    """Where the footer keeps the block of the first dictionary: Footer.dictionaries, field 2."""
    start = _footer_start(data)
    table = start + struct.unpack_from("<I", data, start)[0]
    vtable = table - struct.unpack_from("<i", data, table)[0]
    field = table + struct.unpack_from("<H", data, vtable + 4 + 2 * 2)[0]
    vector = field + struct.unpack_from("<I", data, field)[0]
    return int(vector) + 4


def test_more_batches_or_none() -> None:
    batch = honest()
    for count in (0, 2):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            for _ in range(count):
                writer.write_batch(batch)
        refuse(sink.getvalue().to_pybytes(), "batches or dictionaries")


def test_what_is_no_arrow_file() -> None:
    for data in (b"", b"ARROW1", b"ARROW1ARROW1", b"ARROW1\0\0" + bytes(100) + b"ARROW1", bytes(1 << 20)):
        refuse(data, "not a whole Arrow file|metadata offset|longer than the file|batches or dictionaries")
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, honest().schema) as writer:
        writer.write_batch(honest())
    refuse(stream.getvalue().to_pybytes(), "not a whole Arrow file")


def test_a_footer_that_claims_anything() -> None:
    data = forged(honest())
    for length in (0, -1, 1, 8, 10**6, (1 << 31) - 1, -(1 << 31)):
        refuse(data[:-10] + struct.pack("<i", length) + b"ARROW1", ".")
