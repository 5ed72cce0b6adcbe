"""Between Arrow, NumPy and Python by the buffers alone.

pyarrow's own conversions import pandas wherever it is installed, as it is beside Ray: half a second before the first
save, and 40 MB in every coordinator, for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distckpt.format.arrays import Ints

FORMAT_FIELD = b"distckpt.format"
"""Where the metadata of a schema says which version of our format it is."""

DIMENSIONS = ("shape", "offset", "length")
"""The columns that say of which tensor a chunk is a part, and where in it."""


def column_of(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array[Any]:
    """``numbers`` as a column of that type; not copied if they are of it. ValueError if one does not fit."""
    values = np.ascontiguousarray(numbers, _dtype(kind))
    if values.dtype != numbers.dtype and not np.array_equal(values, numbers):
        raise ValueError(f"numbers from {numbers.min()} to {numbers.max()} do not fit {kind}")
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.data)])


def numbers_of(column: pa.Array[Any] | pa.ChunkedArray[Any]) -> npt.NDArray[Any]:
    """The numbers of a column, read-only and, if it is of one chunk, not copied. ValueError if there are nulls."""
    if column.null_count:
        raise ValueError("a column has nulls")
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = _dtype(whole.type)
    if len(whole) == 0:  # and then it may have no buffer
        return np.empty(0, kind)
    data: Any = whole.buffers()[1]
    numbers: npt.NDArray[Any] = np.frombuffer(data, kind, len(whole), whole.offset * kind.itemsize)
    numbers.flags.writeable = False
    return numbers


def starts_of(column: Any) -> Ints:
    """Where each list of a column of lists begins in ``column.values``, and where the last one ends."""
    if len(column) == 0:  # Arrow allows such a column to have no offset at all
        return np.zeros(1, np.int64)
    return numbers_of(column.offsets).astype(np.int64)


def lists(starts: npt.NDArray[Any], values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array[Any]:
    """A column of lists, ``values[starts[i] : starts[i + 1]]`` each, of the list type ``kind``."""
    inner = column_of(values, kind.field(0).type)
    return pa.Array.from_buffers(kind, len(starts) - 1, [None, _data(starts)], children=[inner])


def tuples(found: Sequence[Sequence[int]], kind: pa.DataType) -> pa.Array[Any]:
    """A column of lists of integers, of the list type ``kind``."""
    return lists(_starts(found), np.fromiter(itertools.chain.from_iterable(found), np.int64), kind)


def optional(numbers: Sequence[int | None], kind: pa.DataType) -> pa.Array[Any]:
    """A column of numbers, some of which may be missing."""
    there = np.array([number is not None for number in numbers], np.bool_)
    known = np.packbits(there, bitorder="little").tobytes()
    values = np.array([number or 0 for number in numbers], _dtype(kind)).tobytes()
    return pa.Array.from_buffers(kind, len(numbers), [pa.py_buffer(known), pa.py_buffer(values)])


def texts(found: Sequence[str]) -> pa.Array[Any]:
    """A column of texts."""
    encoded = [text.encode() for text in found]
    buffers = [None, _data(_starts(encoded)), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.utf8(), len(encoded), buffers)


def _starts(parts: Sequence[Any]) -> Ints:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _data(starts: npt.NDArray[Any]) -> pa.Buffer | None:
    return column_of(starts, pa.int32()).buffers()[1]


def _dtype(kind: pa.DataType) -> np.dtype[Any]:
    """Not by ``to_pandas_dtype``, which needs pandas in pyarrow before 26."""
    return np.dtype("object" if pa.types.is_null(kind) else str(kind))
