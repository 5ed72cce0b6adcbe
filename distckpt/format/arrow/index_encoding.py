"""Making an index out of the plan and the receipts: by concatenation only, with no Python object for a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from distckpt.errors import RankFailedError
from distckpt.format.arrays import Bools, Ints
from distckpt.format.arrow.columns import DIMENSIONS, FORMAT_FIELD, column_of, lists, numbers_of
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index_checks import (
    Blocks,
    Finding,
    Places,
    block_counts,
    check_bounds,
    check_inside,
    check_overlaps,
)
from distckpt.format.arrow.receipt import ShardReceipt

FORMAT = 1
MAX_BLOCKS = (1 << 31) - 1

_TEXT = pa.dictionary(pa.int32(), pa.utf8())
_BOX = pa.list_(pa.int64())

SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT),
        pa.field("path", _TEXT),
        pa.field("dtype", _TEXT),
        pa.field("shape", _BOX),
        pa.field("offset", _BOX),
        pa.field("length", _BOX),
        pa.field("rank", pa.int32()),
        pa.field("shard", pa.int32()),
        pa.field("position", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("crc32c", pa.uint32()),
        pa.field("block", pa.int64()),
        pa.field("blocks", pa.list_(pa.uint32())),
    ],
    metadata={FORMAT_FIELD: b"%d" % FORMAT},
)


class RankRows(Protocol):
    """What a rank says of all its shards: a Receipt."""

    @property
    def shards(self) -> Sequence[ShardReceipt]:
        """Together their rows are those assigned to the rank, in order of shard."""


@dataclass(frozen=True, slots=True)
class _Blame:
    """Turns what is wrong with a rank's receipt into the error that names the rank."""

    number: int | None
    hosts: Mapping[int, str]

    def error(self, rank: int, reason: str) -> RankFailedError:
        return RankFailedError(self.number, rank, self.hosts.get(rank, ""), f"its receipt is wrong: {reason}")

    def check(self, findings: Iterable[Finding], rows: Places) -> None:
        for found in findings:
            raise self.error(int(rows.rank[found.row]), f"row {found.row} of the plan: {found.reason}")


def encode_rows(
    plan_table: pa.Table,
    receipts: Mapping[int, RankRows],
    number: int | None,
    hosts: Mapping[int, str],
) -> bytes:
    """The plan's columns next to the receipts', as an Arrow IPC file. See ``format.index.encode_index``."""
    blame = _Blame(number, hosts)
    table = plan_table.combine_chunks()
    shards = list(_in_order(receipts))
    rows = _places(shards, blame)
    _check_counts(_numbers(table, "rank"), rows.rank, blame)
    blame.check(check_bounds(rows), rows)
    blame.check(_wrong_sizes(table, rows), rows)
    blame.check(check_inside(rows, sizes_of(receipts)), rows)
    blame.check(check_overlaps(rows), rows)
    return _write(table, rows, _blocks(shards, rows, blame))


def sizes_of(receipts: Mapping[int, RankRows]) -> dict[tuple[int, int], int]:
    """Bytes of every shard, by rank and shard number."""
    return {(rank, shard.shard): shard.size for rank, shard in _in_order(receipts)}


def _in_order(receipts: Mapping[int, RankRows]) -> Iterator[tuple[int, ShardReceipt]]:
    for rank in sorted(receipts):
        for shard in sorted(receipts[rank].shards, key=lambda shard: shard.shard):
            yield rank, shard


def _places(shards: Sequence[tuple[int, ShardReceipt]], blame: _Blame) -> Places:
    last = (-1, -1)
    for rank, shard in shards:
        if not len(shard.positions) == len(shard.sizes) == len(shard.block_sizes) == 8 * shard.rows:
            raise blame.error(rank, f"shard {shard.shard} has arrays of other lengths than its {shard.rows} rows")
        if (rank, shard.shard) == last:
            raise blame.error(rank, f"it lists shard {shard.shard} twice")
        last = (rank, shard.shard)
    counts = [shard.rows for _, shard in shards]
    return Places(
        rank=np.repeat(np.array([rank for rank, _ in shards], dtype=np.int64), counts),
        shard=np.repeat(np.array([shard.shard for _, shard in shards], dtype=np.int64), counts),
        position=_joined(shard.positions for _, shard in shards),
        size=_joined(shard.sizes for _, shard in shards),
        block=_joined(shard.block_sizes for _, shard in shards),
    )


def _joined(parts: Iterable[bytes]) -> Ints:
    return np.frombuffer(b"".join(parts), dtype="<i8").astype(np.int64, copy=False)


def _numbers(table: pa.Table, name: str) -> Ints:
    column = table.column(name)
    if column.null_count:
        raise ValueError(f"column {name} of the plan has nulls")
    numbers: Ints = numbers_of(column).astype(np.int64)
    return numbers


def _check_counts(planned: Ints, received: Ints, blame: _Blame) -> None:
    """Every rank sent as many rows as the plan gives it, so that the two stand side by side in the same order."""
    if np.any(np.diff(planned) < 0) or np.any(planned < 0):
        raise ValueError("the plan's rows are not in order of rank")
    if np.array_equal(planned, received):
        return
    width = int(max(planned.max(initial=0), received.max(initial=0))) + 1
    wanted, got = np.bincount(planned, minlength=width), np.bincount(received, minlength=width)
    rank = int(np.argmax(wanted != got))
    raise blame.error(rank, f"{got[rank]} rows, and the plan gives it {wanted[rank]}")


def _wrong_sizes(table: pa.Table, rows: Places) -> Iterator[Finding]:
    dtypes = table.column("dtype").cast(pa.utf8()).combine_chunks().dictionary_encode()
    value = np.array([name == VALUE for name in dtypes.dictionary.to_pylist()], dtype=np.bool_)
    wrong: Bools = ~value[numbers_of(dtypes.indices)] & (rows.size != _numbers(table, "nbytes"))
    if wrong.any():
        row = int(np.argmax(wrong))
        yield Finding(row, f"{rows.size[row]} bytes long, and the plan says {_numbers(table, 'nbytes')[row]}")


def _blocks(shards: Sequence[tuple[int, ShardReceipt]], rows: Places, blame: _Blame) -> Blocks:
    starts = np.zeros(len(rows.size) + 1, dtype=np.int64)
    np.cumsum(block_counts(rows), out=starts[1:])
    row = 0
    for rank, shard in shards:
        expected = int(starts[row + shard.rows] - starts[row])
        if len(shard.blocks) != 4 * expected:
            raise blame.error(rank, f"shard {shard.shard} has {len(shard.blocks) / 4:g} block CRCs, not {expected}")
        row += shard.rows
    if starts[-1] > MAX_BLOCKS:
        raise ValueError(f"{starts[-1]} blocks are more than an index can hold")
    values = np.frombuffer(b"".join(shard.blocks for _, shard in shards), dtype="<u4")
    return Blocks(starts, values.astype(np.uint32, copy=False))


def _write(table: pa.Table, rows: Places, blocks: Blocks) -> bytes:
    batch = pa.record_batch(
        [
            *(_text(table, name) for name in ("key", "path", "dtype")),
            *(_box(table, name) for name in DIMENSIONS),
            column_of(rows.rank, pa.int32()),
            column_of(rows.shard, pa.int32()),
            column_of(rows.position, pa.int64()),
            column_of(rows.size, pa.int64()),
            column_of(blocks.values[blocks.starts[1:] - 1], pa.uint32()),
            column_of(rows.block, pa.int64()),
            lists(blocks.starts, blocks.values, SCHEMA.field("blocks").type),
        ],
        schema=SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _text(table: pa.Table, name: str) -> pa.Array[Any]:
    """In the order of the plan's dictionary, which is that of the trees that were saved, less what no row uses."""
    column = table.column(name)
    if column.null_count:
        raise ValueError(f"column {name} of the plan has nulls")
    encoded: Any = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        plain: pa.Array[Any] = encoded.cast(pa.utf8()).dictionary_encode()
        return plain
    used, codes = np.unique(numbers_of(encoded.indices), return_inverse=True)
    texts = encoded.dictionary.cast(pa.utf8()).take(column_of(used.astype(np.int64), pa.int64()))
    ordered: pa.Array[Any] = pa.DictionaryArray.from_arrays(
        column_of(codes.reshape(-1).astype(np.int32), pa.int32()), texts
    )
    return ordered


def _box(table: pa.Table, name: str) -> pa.Array[Any]:
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise ValueError(f"column {name} of the plan has nulls")
    return column.cast(_BOX)
