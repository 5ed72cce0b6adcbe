"""Comparing what Arrow finds in a shard with what the index says of it, without reading any payload."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distckpt.format.arrow.columns import DIMENSIONS
from distckpt.format.arrow.shard import MAP_NORESERVE, SCHEMA

_TOLD = ("key", "dtype", *DIMENSIONS, "crc32c")


@dataclass(frozen=True, slots=True)
class Payload:
    """A row as the index has it: ``size`` bytes at ``position`` of the shard, with that CRC32C."""

    key: str
    dtype: str
    shape: list[int]
    offset: list[int]
    length: list[int]
    crc32c: int
    position: int
    size: int


def sparse_image(size: int) -> memoryview:
    """Zeros, as many as a shard has bytes, of which only those that are written to take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return memoryview(mmap.mmap(-1, size, flags=flags)) if size else memoryview(bytearray())


def compare_rows(image: memoryview, expected: Sequence[Payload]) -> Iterator[tuple[str | None, str]]:
    """Key and reason for every row that the Arrow file has otherwise than expected, or that it should not have.

    ``image`` has every byte of the shard that is not payload; the others may be anything.
    """
    buffer = pa.py_buffer(image)
    try:
        with pa.ipc.open_file(buffer) as reader:
            if not reader.schema.equals(SCHEMA, check_metadata=True):
                yield None, "its columns are not those of a shard of this format"
                return
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield None, f"not a sound Arrow file: {error}"
        return
    count = sum(batch.num_rows for batch in batches)
    if count != len(expected):
        yield None, f"has {count} rows, and the index has {len(expected)} of it"
        return
    first = 0
    for batch in batches:
        yield from _compare(batch, buffer, expected[first : first + batch.num_rows])
        first += batch.num_rows


def _compare(batch: pa.RecordBatch, buffer: pa.Buffer, expected: Sequence[Payload]) -> Iterator[tuple[str, str]]:
    for name in _TOLD:
        for found, row in zip(batch.column(name).to_pylist(), expected, strict=True):
            if found != getattr(row, name):
                yield row.key, f"its {name} is {found!r:.80} in the shard and {getattr(row, name)!r:.80} in the index"
    for (position, size), row in zip(_places(batch.column("data"), buffer), expected, strict=True):
        if size != row.size or (size and position != row.position):
            yield (
                row.key,
                f"its bytes are {size} from {position} on in the shard, and {row.size} from {row.position} in the index",
            )


def _places(data: Any, buffer: pa.Buffer) -> list[tuple[int, int]]:
    """Where in the file each row's payload is: first byte and size, -1 for a row that has none."""
    _, offsets, values = data.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64, count=len(data) + 1, offset=8 * data.offset)
    base = values.address - buffer.address if values is not None else 0
    if not 0 <= base <= buffer.size:
        return [(-1, -1)] * len(data)  # compressed: Arrow had to put it elsewhere
    return list(zip((starts[:-1] + base).tolist(), np.diff(starts).tolist(), strict=True))
