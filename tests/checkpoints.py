"""Checkpoints on storage for tests of what only reads: made with the format's own parts, without a manager."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import crc32c
import msgspec

from distckpt.format import names
from distckpt.format.log import CheckpointRecord, Entry, State
from distckpt.format.manifest import Manifest, ShardRecord
from distckpt.format.sealed import seal
from distckpt.storage import Store, open_store
from distckpt.transfer.log import append, read_tail


def new_attempt(epoch: int = 1) -> str:
    return f"e{epoch}-{uuid.uuid4().hex}"


def append_state(store: Store, change: Callable[[State], State], kind: str = "commit") -> None:
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
        return msgspec.structs.replace(state, active=(*others, record), retiring=(*state.retiring, *same))

    append_state(store, change)


def commit_bare(directory: str | Path, number: int) -> str:
    """Commit a checkpoint that is nothing but a manifest: enough for what only follows the log. Its path."""
    store = open_store(directory)
    commit(store, put_manifest(store, number, new_attempt()))
    return f"{store.url}/ckpt-{number}"
