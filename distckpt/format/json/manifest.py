"""The manifest: a checkpoint's own description, enough to open a checkpoint directory that was copied alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import ClassVar

import msgspec

from distckpt.format.json.left_out import LeftOut
from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import (
    MAX_BYTES,
    MAX_CRC32C,
    MAX_INDEX_BYTES,
    MAX_NUMBER,
    MAX_SHARDS_OF_RANK,
    MAX_WORLD,
    shown,
)
from distckpt.format.names import is_attempt, is_name

FORMAT = 1
MAX_MANIFEST_BYTES = 64 << 20

_DIGEST = re.compile(r"(?:[0-9a-f]{16})?")


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shard ``shard`` of ``rank``; its path is derived from the two, never stored."""

    rank: int
    shard: int
    size: int
    crc32c: int


class Manifest(Sealed, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All shards with size and CRC32C, in order of rank and shard, and the index that says what is in them.

    ``data`` is '' if the shards are beside it, else a digest of the URL of where they are: no path, which readers are
    given, but enough to tell them that they were given none, or another one. ``left_out`` is None if it holds all there was.
    """

    MAX_BYTES: ClassVar[int] = MAX_MANIFEST_BYTES

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
    data: str = ""
    left_out: LeftOut | None = None

    @property
    def base_path(self) -> str:
        """Where the frozen parameters were when it was saved; '' if it names no such checkpoint."""
        base = self.left_out.base if self.left_out is not None else None
        return base.path if base is not None else ""

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        if not is_name(self.name):
            yield f"{shown(self.name)} is not a checkpoint name"
        if not is_attempt(self.attempt):
            yield f"{shown(self.attempt)} is not an attempt id"
        if not 1 <= self.world_size <= MAX_WORLD:
            yield f"world size {self.world_size} is out of bounds"
        if not (0 <= self.number <= MAX_NUMBER and 0 <= self.epoch <= MAX_NUMBER):
            yield f"number {self.number} or epoch {self.epoch} is out of bounds"
        if not math.isfinite(self.time):
            yield "its time is not a number"
        if not (0 <= self.index_size <= MAX_INDEX_BYTES and 0 <= self.index_crc32c <= MAX_CRC32C):
            yield f"index size {self.index_size} or CRC32C {self.index_crc32c} is out of bounds"
        if not _DIGEST.fullmatch(self.data):
            yield f"{shown(self.data)} is no digest of where its shards are"
        if self.left_out is not None:
            yield from self.left_out.problems()
        yield from _shard_problems(self.shards, self.world_size)


def _shard_problems(shards: tuple[ShardRecord, ...], world_size: int) -> Iterator[str]:
    last = (-1, -1)
    total = 0
    for record in shards:
        here = (record.rank, record.shard)
        if not (0 <= record.rank < world_size and 0 <= record.shard < MAX_SHARDS_OF_RANK):
            yield f"shard {record.shard} of rank {record.rank} cannot be in a world of {world_size}"
        if here <= last:
            yield f"shard {record.shard} of rank {record.rank} is listed twice or out of order"
        if not (0 <= record.size <= MAX_BYTES and 0 <= record.crc32c <= MAX_CRC32C):
            yield f"size or CRC32C of shard {record.shard} of rank {record.rank} is out of bounds"
        last = here
        total += record.size
    if total > MAX_BYTES:
        yield "its shards add up to more bytes than can exist"
