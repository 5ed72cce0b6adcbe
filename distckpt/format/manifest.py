"""The manifest: a checkpoint's own description, enough to open a checkpoint directory that was copied alone."""

from __future__ import annotations

import msgspec

FORMAT = 1
MAX_MANIFEST_BYTES = 64 << 20


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shard ``shard`` of ``rank``; its path is derived from the two, never stored."""

    rank: int
    shard: int
    size: int
    crc32c: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All shards with size and CRC32C, in order of rank and shard, and the index that says what is in them."""

    format: int
    name: str
    number: int
    attempt: str
    epoch: int
    time: float
    world_size: int
    index_size: int
    index_crc32c: int
    shards: tuple[ShardRecord, ...]
