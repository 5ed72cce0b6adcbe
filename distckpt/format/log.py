"""The log: what an entry says, and the checkpoint state that the newest one holds whole."""

from __future__ import annotations

from typing import Literal

import msgspec

FORMAT = 1
MAX_ENTRY_BYTES = 64 << 20

Kind = Literal["claim", "run", "commit", "retire", "forget", "pin", "metric"]


class CheckpointRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One committed checkpoint. ``time`` is the commit, in epoch seconds; ``nbytes`` sums its shards."""

    name: str
    number: int
    attempt: str
    manifest_size: int
    manifest_crc32c: int
    time: float
    world_size: int
    nbytes: int
    pinned: bool = False
    metrics: dict[str, float] = {}


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the log knows. ``active`` is in save order, oldest first; its last element is the newest checkpoint.

    ``retiring`` are checkpoints that nobody may open any more and whose objects are being deleted.
    ``run`` counts incarnations of the job; ``run_token`` names the current one.
    """

    active: tuple[CheckpointRecord, ...] = ()
    preserved: tuple[CheckpointRecord, ...] = ()
    retiring: tuple[CheckpointRecord, ...] = ()
    last_preserved_timestamp: float = 0.0
    run: int = 0
    run_token: str = ""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One log entry. ``commit_id`` is unique for ever, so a coordinator recognizes its own entry after a lost answer."""

    format: int
    seq: int
    epoch: int
    kind: Kind
    time: float
    commit_id: str
    state: State
