"""The index of a checkpoint: one row a chunk, with what it holds of which tensor and where its bytes are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from distckpt.errors import DamagedError, UnsupportedFormatError
from distckpt.format.arrays import Crcs, Ints
from distckpt.format.arrow.arrow_file import check_plain
from distckpt.format.arrow.columns import DIMENSIONS, FORMAT_FIELD, numbers_of, starts_of
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE, is_dtype
from distckpt.format.arrow.index_checks import (
    Blocks,
    Boxes,
    Finding,
    Places,
    check_blocks,
    check_bounds,
    check_boxes,
    check_inside,
    check_overlaps,
    check_wholes,
)
from distckpt.format.arrow.index_encoding import FORMAT, SCHEMA, RankRows, encode_rows, sizes_of
from distckpt.format.limits import MAX_DIMENSIONS, MAX_INDEX_BYTES, shown


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One tensor or plain value: ``path`` is its path in the tree as JSON text, ``dtype`` "json" for a value.

    ``nbytes`` is the whole tensor's size, ``ranks`` those that wrote a part of it, ascending.
    """

    key: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """All chunks of a checkpoint. Rows are numbered as they were written: by rank, then by shard and position.

    By key id, K of them: ``names``, ``paths``, ``dtypes``, ``item_sizes`` (bytes, 0 for plain values), ``ndims``,
    ``shapes`` [K, D]. By row, N of them: ``key`` (its id), ``offset`` and ``length`` [N, D], ``rank``, ``shard``,
    ``position``, ``size`` and ``block`` in bytes; ``blocks[starts[i]:starts[i + 1]]`` are row i's running CRC32C.
    D is the largest number of dimensions, at least 1; what a tensor lacks is padded with shape 1, offset 0, length 1.
    Without ``has_sums`` it is of files that have no CRCs: ``blocks`` are zeros then, and mean nothing.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    dtypes: tuple[str, ...]
    item_sizes: Ints
    ndims: Ints
    shapes: Ints
    key: Ints
    offset: Ints
    length: Ints
    rank: Ints
    shard: Ints
    position: Ints
    size: Ints
    block: Ints
    starts: Ints
    blocks: Crcs
    ids: Mapping[str, int] = field(repr=False)
    grouped: Ints = field(repr=False)
    groups: Ints = field(repr=False)
    has_sums: bool = True

    def __len__(self) -> int:
        return len(self.key)

    def __contains__(self, key: object) -> bool:
        return key in self.ids

    def keys(self) -> tuple[str, ...]:
        """Every key, in the order in which they were first written."""
        return self.names

    def rows(self, key: str) -> Ints:
        """The rows that hold parts of ``key``, ascending; none for a key that the checkpoint does not have."""
        number = self.ids.get(key)
        return self.grouped[:0] if number is None else self.grouped[self.groups[number] : self.groups[number + 1]]

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a key. KeyError if there is no such key."""
        number = self.ids[key]
        return self.dtypes[number], tuple(self.shapes[number, : self.ndims[number]].tolist())

    def info(self, key: str) -> KeyInfo:
        """What is known of ``key``. ValueError if the checkpoint does not have it."""
        number = self.ids.get(key)
        if number is None:
            raise ValueError(f"the checkpoint has no key {key!r}")
        rows = self.rows(key)
        shape = tuple(self.shapes[number, : self.ndims[number]].tolist())
        dtype = self.dtypes[number]
        nbytes = self.size[rows].sum() if dtype == VALUE else np.prod(shape, dtype=np.int64) * self.item_sizes[number]
        ranks = tuple(np.unique(self.rank[rows]).tolist())
        return KeyInfo(key, self.paths[number], dtype, shape, int(nbytes), ranks)


def encode_index(
    plan_table: pa.Table,
    receipts: Mapping[int, RankRows],
    number: int | None = None,
    hosts: Mapping[int, str] | None = None,
) -> bytes:
    """The index of a checkpoint as an Arrow IPC file that is known to read back.

    ``plan_table`` has one row a chunk: key, path, dtype, shape, offset, length, rank, nbytes (0 for plain values),
    ordered by rank and then as written. Raises RankFailedError, naming the rank, for a receipt that does not fit the
    plan or itself; ValueError for a plan that no reader would accept. ``number`` and ``hosts`` only make the error
    say more.
    """
    data = encode_rows(plan_table, receipts, number, hosts or {})
    if len(data) > MAX_INDEX_BYTES:
        raise ValueError(f"an index of {len(data)} bytes is more than {MAX_INDEX_BYTES}")
    try:
        decode_index(data, "the index", sizes_of(receipts))
    except DamagedError as error:
        raise ValueError(f"the plan makes no index: {error}") from error
    return data


def decode_index(data: bytes, path: str, shard_sizes: Mapping[tuple[int, int], int] | None = None) -> Index:
    """The index that these bytes are, every row checked. They should have been compared with the manifest before.

    ``shard_sizes`` maps (rank, shard) to bytes; given that, a row outside its shard is refused too. Raises
    UnsupportedFormatError for another format version, DamagedError for everything else that is wrong.
    """
    batch = _read(data, path)
    index = _assemble(batch, path)
    for findings in _findings(index, numbers_of(batch.column("crc32c")), shard_sizes):
        for found in findings:
            raise DamagedError(path, f"row {found.row}: {found.reason}", index.names[int(index.key[found.row])])
    return index


def _findings(
    index: Index, crc32c: Crcs, shard_sizes: Mapping[tuple[int, int], int] | None
) -> Iterator[Iterator[Finding]]:
    key = index.key
    boxes = Boxes(index.ndims[key], index.shapes[key], index.offset, index.length, index.item_sizes[key])
    rows = Places(index.rank, index.shard, index.position, index.size, index.block)
    yield check_bounds(rows)
    yield check_boxes(boxes, rows.size)
    yield check_wholes(key, boxes, rows.size)
    yield check_blocks(rows, Blocks(index.starts, index.blocks), crc32c)
    yield check_overlaps(rows)
    if shard_sizes is not None:
        yield check_inside(rows, shard_sizes)


def _read(data: bytes, path: str) -> pa.RecordBatch:
    check_plain(data, path, dictionaries=3, batches=1)
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        _check_schema(reader.schema, path)
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DamagedError(path, f"not a sound Arrow file: {error}") from error
    for name in batch.schema.names:
        column = _column(batch, name)
        if column.null_count or (pa.types.is_list(column.type) and column.values.null_count):
            raise DamagedError(path, f"column {name} has nulls")
    return batch


def _check_schema(schema: pa.Schema, path: str) -> None:
    metadata = schema.metadata or {}
    version = metadata.get(FORMAT_FIELD)
    if version is not None and version != b"%d" % FORMAT:
        found = version[:20].decode("ascii", "replace")
        raise UnsupportedFormatError(path, f"format version {found}, and this release reads version {FORMAT}")
    if not schema.equals(SCHEMA, check_metadata=True):
        raise DamagedError(path, f"its columns are not those of an index: {shown(', '.join(schema.names))}")


def _column(batch: pa.RecordBatch, name: str) -> Any:
    """Any: the schema fixes its kind, of which pyarrow's annotations know nothing."""
    return batch.column(name)


def _texts(batch: pa.RecordBatch, name: str) -> tuple[str, ...]:
    return tuple(_column(batch, name).dictionary.to_pylist())


def _assemble(batch: pa.RecordBatch, path: str) -> Index:
    names, key = _texts(batch, "key"), _ids(batch, "key")
    first = _first_rows(key, names, path)
    shape, offset, length = (_boxes(batch, name, path) for name in DIMENSIONS)
    if not (np.array_equal(shape.count, offset.count) and np.array_equal(shape.count, length.count)):
        raise DamagedError(path, "a row whose shape, offset and length differ in dimensions")
    width = int(shape.count.max(initial=1))
    shapes, paths, dtypes = shape.padded(width, 1), _ids(batch, "path"), _ids(batch, "dtype")
    _check_agreement([shape.count, paths, dtypes, *shapes.T], key, first, names, path)
    path_texts, dtype_texts = _texts(batch, "path"), _known_dtypes(batch, path)
    dtype_of = tuple(dtype_texts[number] for number in dtypes[first].tolist())
    starts, blocks = _blocks(batch)
    grouped = np.argsort(key, kind="stable")
    return Index(
        names=names,
        paths=tuple(path_texts[number] for number in paths[first].tolist()),
        dtypes=dtype_of,
        item_sizes=np.array([ITEM_SIZES.get(dtype, 0) for dtype in dtype_of], dtype=np.int64),
        ndims=shape.count[first],
        shapes=shapes[first],
        key=key,
        offset=offset.padded(width, 0),
        length=length.padded(width, 1),
        starts=starts,
        blocks=blocks,
        ids={name: number for number, name in enumerate(names)},
        grouped=grouped,
        groups=np.searchsorted(key[grouped], np.arange(len(names) + 1)),
        rank=_numbers(batch, "rank"),
        shard=_numbers(batch, "shard"),
        position=_numbers(batch, "position"),
        size=_numbers(batch, "size"),
        block=_numbers(batch, "block"),
    )


def _ids(batch: pa.RecordBatch, name: str) -> Ints:
    ids: Ints = numbers_of(_column(batch, name).indices).astype(np.int64)
    return ids


def _first_rows(key: Ints, names: tuple[str, ...], path: str) -> Ints:
    """The first row of every key; refuses keys that are listed twice or that have no row."""
    if len(set(names)) < len(names):
        raise DamagedError(path, "it lists a key twice")
    used, first = np.unique(key, return_index=True)
    if len(used) < len(names):
        raise DamagedError(path, "it lists a key that has no rows")
    return first.astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Lists:
    """A list column: ``count`` elements in each row."""

    count: Ints
    values: Ints

    def padded(self, width: int, fill: int) -> Ints:
        """As a [rows, width] array."""
        out: Ints = np.full((len(self.count), width), fill, dtype=np.int64)
        out[np.arange(width) < self.count[:, None]] = self.values
        return out


def _boxes(batch: pa.RecordBatch, name: str, path: str) -> _Lists:
    column = _column(batch, name)
    offsets = starts_of(column)
    lists = _Lists(np.diff(offsets), numbers_of(column.values)[offsets[0] : offsets[-1]])
    if int(lists.count.max(initial=0)) > MAX_DIMENSIONS:
        raise DamagedError(path, f"a tensor of more than {MAX_DIMENSIONS} dimensions")
    return lists


def _known_dtypes(batch: pa.RecordBatch, path: str) -> tuple[str, ...]:
    dtypes = _texts(batch, "dtype")
    for dtype in dtypes:
        if not is_dtype(dtype):
            raise DamagedError(path, f"{shown(dtype)} is not an element type that this release knows")
    return dtypes


def _check_agreement(columns: list[Ints], key: Ints, first: Ints, names: tuple[str, ...], path: str) -> None:
    """All rows of one key must say the same of the tensor as a whole."""
    for column in columns:
        differs = column != column[first][key]
        if differs.any():
            row = int(np.argmax(differs))
            raise DamagedError(path, f"row {row} disagrees with others on path, dtype or shape", names[int(key[row])])


def _numbers(batch: pa.RecordBatch, name: str) -> Ints:
    numbers: Ints = numbers_of(batch.column(name)).astype(np.int64)
    return numbers


def _blocks(batch: pa.RecordBatch) -> tuple[Ints, Crcs]:
    column = _column(batch, "blocks")
    starts = starts_of(column)
    values: Crcs = numbers_of(column.values)[starts[0] : starts[-1]]
    return starts - starts[0], values
