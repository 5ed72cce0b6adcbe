"""A manifest and a log entry, and how anybody would write one without distckpt."""

from __future__ import annotations

import json
from typing import Any

import crc32c
import msgspec

from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.manifest import Manifest, ShardRecord

ATTEMPT = "e3-0123456789abcdef0123456789abcdef"

RECORD = CheckpointRecord(
    name="ckpt",
    number=42,
    attempt=ATTEMPT,
    manifest_size=1000,
    manifest_crc32c=7,
    time=1.7e9,
    world_size=2,
    nbytes=1 << 40,
    metrics={'a "quoted\\ [[{{ näme': 0.1},
)
OLDER = msgspec.structs.replace(RECORD, number=41, attempt=ATTEMPT.replace("e3", "e2"))
ENTRY = Entry(
    format=1, seq=9, epoch=3, kind="commit", time=1.7e9, commit_id="c1", state=State(active=(OLDER, RECORD), run=2)
)
MANIFEST = Manifest(
    format=1,
    name="ckpt",
    number=42,
    attempt=ATTEMPT,
    epoch=3,
    time=1.7e9,
    world_size=2,
    index_size=100,
    index_crc32c=5,
    shards=(ShardRecord(0, 0, 10, 1), ShardRecord(0, 1, 0, 2), ShardRecord(1, 0, 30, 3)),
)


def resealed(members: dict[str, Any]) -> bytes:
    """An object with a good checksum, made without distckpt."""
    body = json.dumps(members, separators=(",", ":"))[:-1].encode()
    return body + b',"crc32c":"%08x"}\n' % crc32c.crc32c(body)


def plain(record: msgspec.Struct) -> dict[str, Any]:
    members: dict[str, Any] = msgspec.to_builtins(record)
    return members
