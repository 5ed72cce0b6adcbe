"""The descriptions of all ranks side by side, as dictionaries and integer codes: no Python object a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distckpt.errors import PlanError
from distckpt.format.arrays import Bools, Ints
from distckpt.format.arrow.columns import DIMENSIONS, column_of, lists, numbers_of, starts_of
from distckpt.sharding.description import SCHEMA, decode_description
from distckpt.sharding.omission import Omission, omission_of

Codes = npt.NDArray[np.int32]
_NO_CRC = column_of(np.array([-1]), pa.int64())[0]


@dataclass(frozen=True, slots=True, eq=False)
class Tuples:
    """Distinct tuples of integers. Number i is ``values[starts[i] : starts[i + 1]]``."""

    starts: Ints
    values: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, code: int) -> tuple[int, ...]:
        return tuple(self.values[self.starts[code] : self.starts[code + 1]].tolist())

    @property
    def sizes(self) -> Ints:
        """How many integers each tuple has."""
        return np.diff(self.starts)

    def column(self, dim: int, default: int) -> Ints:
        """Item ``dim`` of every tuple, ``default`` where it is shorter."""
        found = np.full(len(self), default, np.int64)
        longer = self.sizes > dim
        found[longer] = self.values[self.starts[:-1][longer] + dim]
        return found

    def take(self, codes: Codes) -> pa.ListArray[Any]:
        """The tuples with these codes, as list<int64>."""
        tuples = lists(self.starts, self.values, pa.list_(pa.int64()))
        return cast("pa.ListArray[Any]", tuples.take(column_of(codes, pa.int32())))


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """Every row of every rank, ordered by rank and then by row number.

    ``first[r]`` is where rank r's rows begin, ``first[-1]`` the total. ``key``, ``path``, ``dtype``, ``shape``,
    ``offset`` and ``length`` are codes into the dictionaries with the plural names. ``crc`` is -1 where there is none;
    ``led`` says that the lowest rank's chunk is everyone's. ``omissions`` are what each rank leaves out.
    """

    first: Ints
    rank: Codes
    keys: pa.Array[Any]
    paths: pa.Array[Any]
    dtypes: pa.Array[Any]
    shapes: Tuples
    offsets: Tuples
    lengths: Tuples
    key: Codes
    path: Codes
    dtype: Codes
    shape: Codes
    offset: Codes
    length: Codes
    nbytes: Ints
    crc: Ints
    led: Bools
    omissions: tuple[Omission | None, ...] = ()

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.first) - 1

    def key_text(self, row: int) -> str:
        """The key of a row."""
        return str(self.keys[int(self.key[row])].as_py())

    def rectangle_text(self, row: int) -> str:
        """A row's rectangle, for messages."""
        offset, length = self.offsets[int(self.offset[row])], self.lengths[int(self.length[row])]
        return f"offset {list(offset)} length {list(length)}"

    def ranks_of(self, rows: npt.NDArray[np.integer]) -> list[int]:
        """The distinct ranks of these rows, ascending."""
        return [int(rank) for rank in np.unique(self.rank[rows])]

    def fingerprint(self) -> bytes:
        """A SHA-256 of all but the values' CRCs: equal exactly if all ranks' digests are equal."""
        told = hashlib.sha256()
        for part in self._parts():
            told.update(part.nbytes.to_bytes(8, "little"))
            told.update(part)
        return told.digest()

    def _parts(self) -> Iterator[memoryview]:
        for texts in (self.keys, self.paths, self.dtypes):
            yield memoryview(pa.RecordBatch.from_arrays([texts], ["text"]).serialize())
        for tuples in (self.shapes, self.offsets, self.lengths):
            yield from (tuples.starts.data, tuples.values.data)
        for codes in (self.key, self.path, self.dtype, self.shape, self.offset, self.length):
            yield codes.data
        yield from (self.first.data, self.nbytes.data, self.led.data)
        yield from (memoryview(omission.encode()) for omission in self.omissions if omission is not None)


def merge(number: int | None, descriptions: Mapping[int, bytes]) -> Merged:
    """Put the descriptions of ranks 0, 1, 2 ... next to each other.

    PlanError naming the rank whose description cannot be read. ValueError if a rank's description is missing.
    """
    if sorted(descriptions) != list(range(len(descriptions))) or not descriptions:
        raise ValueError("a plan needs the description of every rank from 0 on")
    tables = [_decoded(number, rank, descriptions[rank]) for rank in range(len(descriptions))]
    counts = [table.num_rows for table in tables]
    together = pa.concat_tables([pa.Table.from_batches([], SCHEMA), *tables])
    texts = {name: _encoded_texts(together.column(name)) for name in ("key", "path", "dtype")}
    tuples = {name: _encoded_tuples(together.column(name)) for name in DIMENSIONS}
    return Merged(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        rank=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        keys=texts["key"].dictionary,
        paths=texts["path"].dictionary,
        dtypes=texts["dtype"].dictionary,
        shapes=tuples["shape"][1],
        offsets=tuples["offset"][1],
        lengths=tuples["length"][1],
        key=_codes(texts["key"]),
        path=_codes(texts["path"]),
        dtype=_codes(texts["dtype"]),
        shape=tuples["shape"][0],
        offset=tuples["offset"][0],
        length=tuples["length"][0],
        nbytes=numbers_of(together.column("nbytes")),
        crc=numbers_of(together.column("crc").cast(pa.int64()).fill_null(_NO_CRC)),
        led=numbers_of(together.column("led")).astype(np.bool_),
        omissions=tuple(map(omission_of, tables)),
    )


def _decoded(number: int | None, rank: int, data: bytes) -> pa.Table:
    try:
        return decode_description(data)
    except ValueError as error:
        raise PlanError(number, "what it holds", [rank], str(error)) from error


def _encoded_texts(column: pa.ChunkedArray[Any]) -> pa.DictionaryArray[Any, Any]:
    return cast("pa.DictionaryArray[Any, Any]", column.dictionary_encode().combine_chunks())


def _codes(encoded: pa.DictionaryArray[Any, Any]) -> Codes:
    return numbers_of(encoded.indices)


def _encoded_tuples(column: pa.ChunkedArray[Any]) -> tuple[Codes, Tuples]:
    """Codes and distinct tuples: each list is looked at as the bytes of its integers, which Arrow can hash."""
    whole = cast("pa.ListArray[Any]", column.combine_chunks())
    encoded = encode_slices(starts_of(whole), numbers_of(whole.values))
    return _codes(encoded), _tuples(encoded.dictionary)


def encode_slices(starts: Ints, items: npt.NDArray[np.integer]) -> pa.DictionaryArray[Any, Any]:
    """Dictionary-encode the slices ``items[starts[i] : starts[i + 1]]`` by their bytes."""
    buffers = [None, pa.py_buffer((starts * items.itemsize).tobytes()), pa.py_buffer(items.tobytes())]
    slices = pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers)
    return slices.dictionary_encode()


def _tuples(distinct: Any) -> Tuples:
    _, starts, data = distinct.buffers()
    ends = np.frombuffer(starts, np.int64, len(distinct) + 1) // 8
    return Tuples(ends, np.frombuffer(data or b"", np.int64, int(ends[-1])))
