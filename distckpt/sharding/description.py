"""What one rank holds, told as an Arrow table: one row a chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distckpt.format.arrow.columns import DIMENSIONS, column_of, optional, texts, tuples
from distckpt.sharding.omission import OMISSION, Omission, omission_of


def _tuple_of_int64() -> pa.DataType:
    return pa.list_(pa.field("item", pa.int64(), nullable=False))


SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("key", pa.utf8(), nullable=False),
        pa.field("path", pa.utf8(), nullable=False),
        pa.field("dtype", pa.utf8(), nullable=False),
        pa.field("shape", _tuple_of_int64(), nullable=False),
        pa.field("offset", _tuple_of_int64(), nullable=False),
        pa.field("length", _tuple_of_int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("led", pa.uint8(), nullable=False),
        pa.field("crc", pa.uint32()),
    ]
)
_CRC = SCHEMA.get_field_index("crc")


@dataclass(frozen=True, slots=True)
class Row:
    """A chunk that a rank holds.

    ``nbytes`` is 0 for plain values, which have empty ``shape``, ``offset`` and ``length``. ``crc`` is the CRC32C of what
    must be the same on all ranks that hold it; None where it may differ, or is not looked at. Of a ``led`` chunk the
    lowest rank's is everyone's.
    """

    key: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    length: tuple[int, ...]
    nbytes: int
    crc: int | None = None
    led: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """All rows of a rank, in the order in which it numbers them.

    ``digest`` is the SHA-256, in hex, of everything but the CRCs: it stays the same while training goes on, and
    changes with the structure, the shapes or the layout.
    """

    table: pa.Table
    digest: str

    def encode(self) -> bytes:
        """The table as an Arrow IPC stream."""
        return _ipc(self.table)


def build_description(rows: Iterable[Row], omission: Omission | None = None) -> Description:
    """Describe what a rank holds, and leaves out. ``rows`` become row numbers 0, 1, 2 ... of the description."""
    held = list(rows)
    schema = SCHEMA if omission is None else SCHEMA.with_metadata({OMISSION: omission.encode()})
    table = pa.Table.from_arrays(
        [
            *(texts([getattr(row, name) for row in held]) for name in ("key", "path", "dtype")),
            *(tuples([getattr(row, name) for row in held], _tuple_of_int64()) for name in DIMENSIONS),
            column_of(np.fromiter((row.nbytes for row in held), np.int64), pa.int64()),
            column_of(np.fromiter((row.led for row in held), np.uint8), pa.uint8()),
            optional([row.crc for row in held], pa.uint32()),
        ],
        schema=schema,
    )
    return Description(table, hashlib.sha256(_ipc(table.remove_column(_CRC))).hexdigest())


def decode_description(data: bytes) -> pa.Table:
    """The table that ``Description.encode`` wrote, without copying it. ValueError for any other bytes."""
    try:
        with pa.ipc.open_stream(data) as reader:
            if not reader.schema.equals(SCHEMA):
                raise ValueError(f"not a description: it has the columns {reader.schema.to_string()}")
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a description: {error}") from error
    if any(table.column(i).null_count for i in range(_CRC)):
        raise ValueError("not a description: it has nulls")
    omission_of(table)
    return table


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
