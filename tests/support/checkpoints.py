"""Checkpoints on storage for tests of what only reads: made with the format's own parts, without a manager."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import msgspec
import pyarrow as pa

from distckpt.coordinator.messages import Receipt
from distckpt.directory.log import append, read_tail
from distckpt.format import names
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.shard import Chunk
from distckpt.format.json.log import CheckpointRecord, Entry, Kind, State
from distckpt.format.json.manifest import Manifest, ShardRecord
from distckpt.format.json.sealed import seal
from distckpt.format.tree.tree import DictStep, Leaf, RankStep, encode_path, flatten
from distckpt.format.tree.values import encode_value
from distckpt.storage import Store, open_store


def new_attempt(epoch: int = 1) -> str:
    """An id that nobody else has, of an attempt younger than those before in this process."""
    return f"e{epoch}-{next(_attempts):08x}{uuid.uuid4().hex[:24]}"


_attempts = itertools.count(1)


def append_state(store: Store, change: Callable[[State], State], kind: Kind = "commit") -> None:
    """Append an entry whose state is the newest one's, changed."""
    tail = read_tail(store)
    entry = Entry(
        format=1,
        seq=tail.seq + 1,
        epoch=1,
        kind=kind,
        time=time.time(),
        commit_id=uuid.uuid4().hex,
        state=change(tail.state),
    )
    assert append(store, entry).outcome == "appended"


def put_manifest(
    store: Store,
    number: int,
    attempt: str,
    *,
    name: str = "ckpt",
    index: bytes = b"",
    world_size: int = 1,
    shards: tuple[ShardRecord, ...] = (),
) -> CheckpointRecord:
    """Write the manifest of an attempt; the record is what a commit would put into the log."""
    manifest = Manifest(
        format=1,
        name=name,
        number=number,
        attempt=attempt,
        epoch=names.attempt_epoch(attempt),
        time=time.time(),
        world_size=world_size,
        index_size=len(index),
        index_crc32c=crc32c.crc32c(index),
        shards=shards,
    )
    data = seal(manifest)
    store.put_if_absent(f"{names.attempt_folder(name, number, attempt)}/{names.MANIFEST}", data)
    return CheckpointRecord(
        name=name,
        number=number,
        attempt=attempt,
        manifest_size=len(data),
        manifest_crc32c=crc32c.crc32c(data),
        time=manifest.time,
        world_size=world_size,
        nbytes=sum(shard.size for shard in shards),
    )


def commit(store: Store, record: CheckpointRecord) -> None:
    """Make it the newest active checkpoint; another attempt at its number is retired."""

    def change(state: State) -> State:
        same = [old for old in state.active if (old.name, old.number) == (record.name, record.number)]
        others = tuple(old for old in state.active if old not in same)
        state, placed = state.counted(record)
        return msgspec.structs.replace(state, active=(*others, *placed), retiring=(*state.retiring, *same))

    append_state(store, change)


def commit_bare(directory: str | Path, number: int) -> str:
    """Commit a checkpoint that is nothing but a manifest: enough for what only follows the log. Its path."""
    store = open_store(directory)
    commit(store, put_manifest(store, number, new_attempt()))
    return f"{store.url}/ckpt-{number}"


class PerRankValues(list[Any]):
    """At the top of a tree: one value a rank, written by that rank."""


def write_checkpoint(
    directory: str | Path, number: int, tree: dict[str, Any], ranks: int = 1, name: str = "ckpt"
) -> str:
    """Save ``tree`` as so many ranks would, each tensor cut along its first dimension, and commit it. Its path."""
    from distckpt.format.arrow.index import encode_index
    from distckpt.transfer.writer import write_shard

    store = open_store(directory)
    attempt = new_attempt()
    folder = names.attempt_folder(name, number, attempt)
    rows = _rows(tree, ranks)
    receipts = {}
    for rank in range(ranks):
        staging = _staged([row for row in rows if row.rank == rank])
        paths = [f"{folder}/{names.shard_name(rank, shard.number)}" for shard in staging.shards]
        shards = [write_shard(store, path, shard) for path, shard in zip(paths, staging.shards, strict=True)]
        receipts[rank] = Receipt(attempt, tuple(shards))
        staging.close()
    index = encode_index(_plan_table(rows), receipts)
    store.put_if_absent(f"{folder}/{names.INDEX}", index)
    written = tuple(
        ShardRecord(rank=rank, shard=shard.shard, size=shard.size, crc32c=shard.crc32c)
        for rank, receipt in receipts.items()
        for shard in receipt.shards
    )
    record = put_manifest(store, number, attempt, name=name, index=index, world_size=ranks, shards=written)
    commit(store, record)
    return f"{store.url}/{name}-{number}"


@dataclass(frozen=True)
class _Row:
    rank: int
    path: str
    chunk: Chunk
    content: Any  # a tensor, or a value's bytes


def _rows(tree: dict[str, Any], ranks: int) -> list[_Row]:
    rows: list[_Row] = []
    for name, value in tree.items():
        if isinstance(value, PerRankValues):
            for rank, own in enumerate(value):
                rows += _leaf_rows(flatten(own, _is_tensor, (DictStep(name), RankStep(rank))), [rank])
        else:
            rows += _leaf_rows(flatten(value, _is_tensor, (DictStep(name),)), list(range(ranks)))
    return sorted(rows, key=lambda row: row.rank)


def _leaf_rows(leaves: list[Leaf], ranks: list[int]) -> Iterator[_Row]:
    for leaf in leaves:
        path = encode_path(leaf.path)
        if not _is_tensor(leaf.value):
            content = encode_value(leaf.value, leaf.key)
            yield _Row(ranks[0], path, Chunk(leaf.key, VALUE, (), (), (), len(content)), content)
            continue
        shape, dtype = tuple(leaf.value.shape), str(leaf.value.dtype).removeprefix("torch.")
        parts = [(0, leaf.value)]
        if len(ranks) > 1 and shape and shape[0] >= len(ranks):
            sizes = [len(part) for part in leaf.value.tensor_split(len(ranks))]
            starts = [sum(sizes[:at]) for at in range(len(ranks))]
            parts = list(zip(starts, leaf.value.tensor_split(len(ranks)), strict=True))
        for rank, (start, part) in zip(ranks, parts, strict=False):
            offset = (start, *(0 for _ in shape[1:])) if shape else ()
            chunk = Chunk(leaf.key, dtype, shape, offset, tuple(part.shape), part.numel() * part.element_size())
            yield _Row(rank, path, chunk, part)


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _staged(rows: list[_Row]) -> Any:
    from distckpt.transfer.staging import Staging

    values = [row.content for row in rows if row.chunk.dtype == VALUE]
    staging = Staging([row.chunk for row in rows], values)
    staging.stage([row.content for row in rows if row.chunk.dtype != VALUE], values)
    return staging


def _plan_table(rows: list[_Row]) -> pa.Table:
    def column(make: Callable[[_Row], Any], kind: pa.DataType) -> pa.Array[Any]:
        return pa.array([make(row) for row in rows], kind)

    box = pa.list_(pa.int64())
    return pa.table(
        {
            "key": column(lambda row: row.chunk.key, pa.utf8()),
            "path": column(lambda row: row.path, pa.utf8()),
            "dtype": column(lambda row: row.chunk.dtype, pa.utf8()),
            "shape": column(lambda row: row.chunk.shape, box),
            "offset": column(lambda row: row.chunk.offset, box),
            "length": column(lambda row: row.chunk.length, box),
            "rank": column(lambda row: row.rank, pa.int32()),
            "nbytes": column(lambda row: 0 if row.chunk.dtype == VALUE else row.chunk.nbytes, pa.int64()),
        }
    )
