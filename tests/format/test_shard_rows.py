"""What Arrow finds in a shard and what the index says of it are compared; nothing that differs goes unsaid."""

from __future__ import annotations

import io
from typing import Any

import crc32c
import pyarrow as pa
import pytest

from distckpt.format.arrow.shard import SCHEMA
from distckpt.format.arrow.shard_rows import Payload, compare_rows


def file_of(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def batch_of(**changes: Any) -> pa.RecordBatch:
    columns = {
        "key": pa.array(["k"]),
        "dtype": pa.array(["uint8"]),
        "shape": lists(4),
        "offset": lists(1),
        "length": lists(3),
        "crc32c": pa.array([crc32c.crc32c(b"abc")], pa.uint32()),
        "data": pa.array([b"abc"], pa.large_binary()),
    } | changes
    return pa.record_batch(list(columns.values()), names=list(columns)).replace_schema_metadata(SCHEMA.metadata)


def lists(*values: int | None) -> pa.Array:
    return pa.array([list(values)], pa.list_(pa.int64()))


def found(data: bytes, **changes: Any) -> list[tuple[str | None, str]]:
    """What differs from an index that has the row as it should be."""
    fields = {"key": "k", "dtype": "uint8", "shape": [4], "offset": [1], "length": [3], "size": 3, **changes}
    fields = {"crc32c": crc32c.crc32c(b"abc"), "position": data.find(b"abc"), **fields}
    return list(compare_rows(memoryview(data), [Payload(**fields)]))


def test_what_is_the_same_is_no_finding() -> None:
    assert found(file_of(batch_of())) == []
    payload = file_of(batch_of()).replace(b"abc", b"\0\0\0")  # which is checked by the index's own CRCs
    assert found(payload, position=file_of(batch_of()).find(b"abc")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"key": pa.array(["l"])},
        {"key": pa.array([None], pa.utf8())},
        {"key": pa.array(["k"]).dictionary_encode()},
        {"key": pa.array(["k"], pa.large_utf8())},
        {"data": pa.array([b"abc"])},
        {"data": pa.array([b"abcd"], pa.large_binary())},
        {"dtype": pa.array(["int16"])},
        {"dtype": pa.array(["json"])},
        {"shape": lists(3)},
        {"shape": lists(4, 1)},
        {"shape": lists(None)},
        {"offset": lists(-1)},
        {"length": lists(-3)},
        {"crc32c": pa.array([7], pa.uint32())},
        {"shape": lists(2**63 - 1), "offset": lists(2**63 - 1)},
        {"extra": pa.array([1])},
    ],
)
def test_other_columns_or_values_are_found(changes: dict[str, Any]) -> None:
    assert found(file_of(batch_of(**changes)))


@pytest.mark.parametrize(("field", "value"), [("position", 8), ("size", 2), ("key", "other")])
def test_an_index_that_says_otherwise_is_found(field: str, value: Any) -> None:
    assert found(file_of(batch_of()), **{field: value})


def test_another_number_of_rows_is_found() -> None:
    data = file_of(batch_of())
    assert list(compare_rows(memoryview(data), [])) == [(None, "has 1 rows, and the index has 0 of it")]


def test_compressed_buffers_are_found() -> None:
    large = bytes(1 << 20)
    batch = batch_of(data=pa.array([large], pa.large_binary()), shape=lists(len(large)), length=lists(len(large)))
    data = file_of(batch, pa.ipc.IpcWriteOptions(compression="zstd"))
    assert found(data, shape=[len(large)], length=[len(large)], size=len(large), position=data.find(b"k"))


@pytest.mark.parametrize("metadata", [{"distckpt.format": "2"}, {}])
def test_another_format_is_found(metadata: dict[str, str]) -> None:
    [(key, reason)] = found(file_of(batch_of().replace_schema_metadata(metadata)))
    assert (key, reason) == (None, "its columns are not those of a shard of this format")


@pytest.mark.parametrize("size", [0, 1, 8, 100, 500, -1])
def test_a_shard_cut_short_is_found(size: int) -> None:
    data = file_of(batch_of())
    [(key, reason)] = found(data[:size], position=data.find(b"abc"))
    assert key is None
    assert "not a sound Arrow file" in reason
