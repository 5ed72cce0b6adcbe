"""The log: what an entry says, and the checkpoint state that the newest one holds whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import msgspec

from distckpt.format.json.manifest import MAX_MANIFEST_BYTES
from distckpt.format.json.page import PageRef
from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import MAX_BYTES, MAX_CRC32C, MAX_NUMBER, MAX_WORLD, shown
from distckpt.format.names import attempt_age, is_attempt, is_name

FORMAT = 1
MAX_ENTRY_BYTES = 64 << 20
MAX_ID_LENGTH = 256

Kind = Literal["claim", "run", "commit", "retire", "forget", "pin", "metric", "end"]


class CheckpointRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One committed checkpoint. ``time`` is the commit, in epoch seconds; ``nbytes`` sums its shards.

    ``order`` counts the commits of its log up to this one: no two have the same. It is 0 for those of logs that did not
    count them yet.
    """

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
    order: int = 0

    def problems(self) -> Iterator[str]:
        """Why it makes no sense, whoever wrote it."""
        # All of an entry's are looked at by everybody who reads it: the usual answer is to cost little.
        return iter(()) if self._is_sound() else self._problems()

    def _is_sound(self) -> bool:
        return (
            0 <= self.number <= MAX_NUMBER
            and 0 <= self.order <= MAX_NUMBER
            and 0 <= self.manifest_size <= MAX_MANIFEST_BYTES
            and 0 <= self.manifest_crc32c <= MAX_CRC32C
            and 1 <= self.world_size <= MAX_WORLD
            and 0 <= self.nbytes <= MAX_BYTES
            and math.isfinite(self.time)
            and all(map(math.isfinite, self.metrics.values()))
            and is_attempt(self.attempt)
            and is_name(self.name)
        )

    def _problems(self) -> Iterator[str]:
        if not is_name(self.name):
            yield f"{shown(self.name)} is not a checkpoint name"
        if not is_attempt(self.attempt):
            yield f"{shown(self.attempt)} is not an attempt id"
        where = f"of checkpoint {self.name}-{self.number}"
        if not 0 <= self.number <= MAX_NUMBER:
            yield f"the number {where} is out of bounds"
        if not 0 <= self.order <= MAX_NUMBER:
            yield f"the order {where} is out of bounds"
        if not (0 <= self.manifest_size <= MAX_MANIFEST_BYTES and 0 <= self.manifest_crc32c <= MAX_CRC32C):
            yield f"manifest size or CRC32C {where} is out of bounds"
        if not (1 <= self.world_size <= MAX_WORLD and 0 <= self.nbytes <= MAX_BYTES):
            yield f"world size or bytes {where} are out of bounds"
        if not all(map(math.isfinite, (self.time, *self.metrics.values()))):
            yield f"time or a metric {where} is not a number"


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the log knows. ``active`` is in save order, oldest first; its last element is the newest checkpoint.

    ``retiring`` are checkpoints that nobody may open any more and whose objects are being deleted; one with a manifest
    size of 0 never was a checkpoint, its save failed.
    ``run`` counts incarnations of the job; ``run_token`` names the current one. ``saves`` counts its saves up to the
    newest that was committed: whatever of them is not committed by then never will be. ``origin`` is unique for ever
    and names the log itself, from its first entry on; logs that began before there was such a name have ''.
    ``commits`` counts all checkpoints that ever came into the log, whatever became of them. ``ended`` says that the run
    has said that training is over; whatever comes after that run, or after it in that run, takes it back.

    ``pages`` have what of ``active`` and ``preserved`` is older: all that is said here is about the records at hand, which
    never lack the last active one. ``paging.opened`` has those of pages at hand too.
    """

    active: tuple[CheckpointRecord, ...] = ()
    preserved: tuple[CheckpointRecord, ...] = ()
    retiring: tuple[CheckpointRecord, ...] = ()
    last_preserved_timestamp: float = 0.0
    run: int = 0
    run_token: str = ""
    saves: int = 0
    origin: str = ""
    commits: int = 0
    ended: bool = False
    pages: tuple[PageRef, ...] = ()

    def alive(self) -> dict[str, CheckpointRecord]:
        """What may be opened, by attempt: preserved ones first, then active ones in save order."""
        return {record.attempt: record for record in (*self.preserved, *self.active)}

    def known(self) -> frozenset[str]:
        """Every attempt that it names, those that are being deleted too."""
        return frozenset(record.attempt for record in (*self.active, *self.preserved, *self.retiring))

    def find(self, attempt: str) -> CheckpointRecord | None:
        """The checkpoint that an attempt became, even if it is being deleted by now; None if it never became one."""
        committed = (record for record in self.retiring if record.manifest_size)
        return self.alive().get(attempt) or next((record for record in committed if record.attempt == attempt), None)

    def may_have_in_pages(self, attempt: str) -> bool:
        """Whether a page may have an attempt that is not at hand."""
        return any(page.may_have_attempt(attempt) for page in self.pages)

    def newest_first(self) -> tuple[CheckpointRecord, ...]:
        """What may be opened, each once: the last one committed, then the others by age. No clock has a say in this."""
        last = self.active[-1:]
        older = (record for record in self.alive().values() if record not in last)
        return (*last, *sorted(older, key=lambda record: attempt_age(record.attempt), reverse=True))

    def newest(self) -> CheckpointRecord | None:
        """The first of ``newest_first``, or None if nothing may be opened."""
        return next(iter(self.newest_first()), None)

    def counted(self, *records: CheckpointRecord) -> tuple[State, tuple[CheckpointRecord, ...]]:
        """The state after so many commits more, and the records with their places in the order of commits."""
        placed = tuple(
            msgspec.structs.replace(record, order=order) for order, record in enumerate(records, self.commits + 1)
        )
        return msgspec.structs.replace(self, commits=self.commits + len(placed)), placed

    def doubles(self) -> Iterator[str]:
        """What it lists twice. A checkpoint may be in several lists of one kind only: what is retiring is in no other."""
        for records in (self.active, self.preserved, self.retiring):
            if len({record.attempt for record in records}) < len(records):
                yield "it lists an attempt twice"
        if len({(record.name, record.number) for record in self.active}) < len(self.active):
            yield "it lists two active checkpoints of the same name and number"
        alive = self.alive() if self.retiring else {}
        if any(record.attempt in alive for record in self.retiring):
            yield "it lists a checkpoint both as alive and as being deleted"
        if len({page.id for page in self.pages}) < len(self.pages):
            yield "it refers to a page twice"


class Entry(Sealed, frozen=True, forbid_unknown_fields=True):
    """One log entry. ``commit_id`` is unique for ever, so a coordinator recognizes its own entry after a lost answer."""

    MAX_BYTES: ClassVar[int] = MAX_ENTRY_BYTES

    format: int
    seq: int
    epoch: int
    kind: Kind
    time: float
    commit_id: str
    state: State

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        state = self.state
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        counts = {
            "seq": self.seq,
            "epoch": self.epoch,
            "run": state.run,
            "saves": state.saves,
            "commits": state.commits,
        }
        for name, count in counts.items():
            if not 0 <= count <= MAX_NUMBER:
                yield f"{name} {count} is out of bounds"
        if not (math.isfinite(self.time) and math.isfinite(state.last_preserved_timestamp)):
            yield "a time in it is not a number"
        if (
            not 1 <= len(self.commit_id) <= MAX_ID_LENGTH
            or max(len(state.run_token), len(state.origin)) > MAX_ID_LENGTH
        ):
            yield "its commit id, run token or origin is empty or too long"
        for record in (*state.active, *state.preserved, *state.retiring):
            yield from record.problems()
        for page in state.pages:
            yield from page.problems()
        yield from state.doubles()
