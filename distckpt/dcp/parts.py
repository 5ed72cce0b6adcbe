"""Writing a rank's rows as shards, so many bytes at a time that the memory for it stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distckpt.dcp.items import Items
from distckpt.dcp.session import Part
from distckpt.format import names
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.arrow.shard import Chunk
from distckpt.sharding.description import build_description
from distckpt.storage import Store
from distckpt.transfer.staging import Staging
from distckpt.transfer.writer import read_back, write_shard

PART_BYTES = 512 << 20
"""Of a shard, unless a single chunk is larger. DCP has often made a copy already, so there is no room for another of all."""


def write_items(store: Store, folder: str, rank: int, items: Items, verify: bool, most: int = PART_BYTES) -> Part:
    """Write all of it as shards of ``rank`` in ``folder``; durable on return. Raises StorageError, DamagedError."""
    shards: list[ShardReceipt] = []
    for chunks, sources, values in _split(items, most):
        staging = Staging(chunks, values, first=len(shards))
        try:
            staging.stage(sources, values)
            for shard in staging.shards:
                path = f"{folder}/{names.shard_name(rank, shard.number)}"
                shards.append(write_shard(store, path, shard))
                if verify:
                    read_back(store, path, shards[-1])
        finally:
            staging.close()
    description = build_description(items.rows)
    return Part(description.digest, description.encode(), len(items.rows), tuple(shards))


def _split(items: Items, most: int) -> Iterator[tuple[list[Chunk], list[torch.Tensor], list[bytes]]]:
    """Rows in order, in groups of up to ``most`` bytes."""
    chunks: list[Chunk] = []
    sources: list[torch.Tensor] = []
    values: list[bytes] = []
    total = 0
    for row, source, value in zip(items.rows, items.sources, items.values, strict=True):
        nbytes = row.nbytes if value is None else len(value)
        if chunks and total + nbytes > most:
            yield chunks, sources, values
            chunks, sources, values, total = [], [], [], 0
        chunks.append(Chunk(row.key, row.dtype, row.shape, row.offset, row.length, row.nbytes))
        if source is not None:
            sources.append(source)
        if value is not None:
            values.append(value)
        total += nbytes
    if chunks:
        yield chunks, sources, values
