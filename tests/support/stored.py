"""A tiny writer of shards for tests of the read path: real Arrow IPC files, with blocks of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import crc32c
import numpy as np
import pyarrow as pa

from distckpt.coordinator.messages import Receipt
from distckpt.format.arrow.index import Index, decode_index, encode_index
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.names import shard_name
from distckpt.storage import Store

SCHEMA = pa.schema(
    [
        ("key", pa.utf8()),
        ("dtype", pa.utf8()),
        ("shape", pa.list_(pa.int64())),
        ("offset", pa.list_(pa.int64())),
        ("length", pa.list_(pa.int64())),
        ("crc32c", pa.uint32()),
        ("data", pa.large_binary()),
    ],
    metadata={"distckpt.format": "1"},
)


@dataclass(frozen=True)
class Chunk:
    """One chunk and its bytes. ``block`` is its block size; None makes it one block."""

    key: str
    data: bytes
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    offset: tuple[int, ...] = ()
    length: tuple[int, ...] = ()
    rank: int = 0
    shard: int = 0
    block: int | None = None

    @property
    def block_size(self) -> int:
        return self.block or max(1, len(self.data))

    @property
    def running(self) -> list[int]:
        """CRC32C of the bytes from the start to the end of each block."""
        size = self.block_size
        ends = [*range(size, len(self.data), size), len(self.data)]
        return [crc32c.crc32c(self.data[:end]) for end in ends]


def value(key: str, data: bytes, rank: int = 0, shard: int = 0) -> Chunk:
    return Chunk(key, data, dtype="json", rank=rank, shard=shard)


def whole(key: str, data: bytes, block: int | None = None, rank: int = 0, shard: int = 0) -> Chunk:
    """A one-dimensional uint8 tensor that is one chunk."""
    shape = (len(data),)
    return Chunk(key, data, shape=shape, offset=(0,), length=shape, rank=rank, shard=shard, block=block)


def ordered(chunks: Sequence[Chunk]) -> list[Chunk]:
    return sorted(chunks, key=lambda chunk: (chunk.rank, chunk.shard))


def plan_table(chunks: Sequence[Chunk]) -> pa.Table:
    """What the coordinator has of the plan."""
    chunks = ordered(chunks)
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in ("key", "dtype", "rank")}
    boxes = {
        name: pa.array([list(getattr(chunk, name)) for chunk in chunks], pa.list_(pa.int64()))
        for name in ("shape", "offset", "length")
    }
    nbytes = [0 if chunk.dtype == "json" else len(chunk.data) for chunk in chunks]
    paths = [f'["{chunk.key}"]' for chunk in chunks]
    return pa.table({**columns, **boxes, "path": paths, "nbytes": pa.array(nbytes, pa.int64())})


def shard_file(chunks: Sequence[Chunk]) -> tuple[bytes, list[int]]:
    """The Arrow IPC file of a shard, and where in it the bytes of each chunk are. Two chunks share a batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for first in range(0, len(chunks), 2):
            some = chunks[first : first + 2]
            names = SCHEMA.names[:5]
            columns = [pa.array([getattr(chunk, name) for chunk in some], SCHEMA.field(name).type) for name in names]
            crcs = pa.array([chunk.running[-1] for chunk in some], pa.uint32())
            data = pa.array([chunk.data for chunk in some], pa.large_binary())
            writer.write_batch(pa.record_batch([*columns, crcs, data], schema=SCHEMA))
    content = sink.getvalue()
    return content.to_pybytes(), _positions(content)


def _positions(content: pa.Buffer) -> list[int]:
    reader = pa.ipc.open_file(content)
    positions = []
    for number in range(reader.num_record_batches):
        _, offsets, payload = reader.get_batch(number).column("data").buffers()
        starts = np.frombuffer(offsets, dtype=np.int64)[: reader.get_batch(number).num_rows]
        base = payload.address - content.address if payload is not None and payload.size else 8
        positions += [base + int(start) for start in starts]
    return positions


def shard_receipt(number: int, content: bytes, positions: Sequence[int], chunks: Sequence[Chunk]) -> ShardReceipt:
    return ShardReceipt(
        shard=number,
        size=len(content),
        crc32c=crc32c.crc32c(content),
        rows=len(chunks),
        positions=np.array(positions, "<i8").tobytes(),
        sizes=np.array([len(chunk.data) for chunk in chunks], "<i8").tobytes(),
        block_sizes=np.array([chunk.block_size for chunk in chunks], "<i8").tobytes(),
        blocks=np.array([crc for chunk in chunks for crc in chunk.running], "<u4").tobytes(),
    )


def write(chunks: Sequence[Chunk], store: Store | None = None, folder: str = "a") -> dict[int, Receipt]:
    """Write every shard into the store, if one is given; the receipts of all ranks."""
    shards: dict[int, list[ShardReceipt]] = {}
    for (rank, number), group in groupby(ordered(chunks), key=lambda chunk: (chunk.rank, chunk.shard)):
        some = list(group)
        content, positions = shard_file(some)
        if store is not None:
            store.put_if_absent(f"{folder}/{shard_name(rank, number)}", content)
        shards.setdefault(rank, []).append(shard_receipt(number, content, positions, some))
    return {rank: Receipt("attempt", tuple(parts)) for rank, parts in shards.items()}


def shard_sizes(receipts: Mapping[int, Receipt]) -> dict[tuple[int, int], int]:
    return {(rank, part.shard): part.size for rank, receipt in receipts.items() for part in receipt.shards}


def stored(chunks: Sequence[Chunk], store: Store | None = None, folder: str = "a") -> Index:
    """Write the chunks; the index as a reader decodes it."""
    receipts = write(chunks, store, folder)
    return decode_index(encode_index(plan_table(chunks), receipts), "index.arrow", shard_sizes(receipts))
