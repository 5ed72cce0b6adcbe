"""Which checkpoints stay. Decided on eviction only, as TensorFlow's CheckpointManager does, and without any clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.messages import Retention
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.paging import place

_FIRST_SLACK = 1.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep decided: ``active`` goes on, ``preserved`` is kept for ever, ``retire`` may be deleted."""

    active: tuple[CheckpointRecord, ...]
    preserved: tuple[CheckpointRecord, ...]
    retire: tuple[CheckpointRecord, ...]
    last_preserved: float

    @property
    def evicts(self) -> bool:
        """Whether anything is active no longer."""
        return bool(self.preserved or self.retire)


def sweep(
    active: Sequence[CheckpointRecord],
    retention: Retention,
    last_preserved: float,
    spared: frozenset[str],
    pages: Sequence[PageRef] = (),
) -> Sweep:
    """Evict whatever is older, by save order, than the newest ``max_to_keep``.

    An evicted checkpoint is preserved if it is at least ``keep_checkpoint_every_n_hours`` younger than the last
    preserved one, else retired. The newest, pinned ones and those in ``spared`` (attempts) stay active; they take
    no place of a younger one, so the newest ``max_to_keep`` always stay. Times are epoch seconds. What is younger than
    something in one of ``pages`` waits until that has been read (``next_due``).
    """
    keep = retention.max_to_keep
    if not keep:
        return Sweep(tuple(active), (), (), last_preserved)
    spacing = (retention.keep_checkpoint_every_n_hours or 0.0) * 3600.0
    stay, preserved, retire = [], [], []
    due = _due(active, math.floor(keep), [page for page in pages if page.of == "active"])
    for record in active[:due]:
        if record.pinned or record.attempt in spared:
            stay.append(record)
        elif spacing and record.time - spacing >= last_preserved:
            preserved.append(record)
            last_preserved = record.time
        else:
            retire.append(record)
    return Sweep((*stay, *active[due:]), tuple(preserved), tuple(retire), last_preserved)


def _due(active: Sequence[CheckpointRecord], keep: int, pages: Sequence[PageRef]) -> int:
    """How many of the oldest are beyond the newest ``keep``, before the first that a page may have."""
    if not pages:
        return max(0, min(len(active) - keep, len(active) - 1))
    first = min(page.first for page in pages)
    for at, record in enumerate(active):
        here = place(record)
        newer = len(active) - 1 - at + sum(page.count for page in pages if page.first > here)
        if newer < max(keep, 1) or here > first:
            return at
    return 0


def next_due(state: State, retention: Retention) -> PageRef | None:
    """The page with the oldest active records, if some of them are beyond the newest ``max_to_keep``."""
    pages = [page for page in state.pages if page.of == "active"]
    if not retention.max_to_keep or not pages:
        return None
    oldest = min(pages, key=lambda page: page.first)
    newer = sum(page.count for page in pages) - 1 + sum(place(record) > oldest.first for record in state.active)
    return oldest if newer >= math.floor(retention.max_to_keep) else None


def keeps_all(retention: Retention) -> bool:
    """Whether nothing is ever evicted, so that active records may go into pages."""
    return not retention.max_to_keep


def swept(state: State, retention: Retention, spared: frozenset[str]) -> State | None:
    """``state`` after a sweep: what is evicted is preserved or retires. None if that is nothing."""
    found = sweep(state.active, retention, state.last_preserved_timestamp, spared, state.pages)
    if not found.evicts:
        return None
    return msgspec.structs.replace(
        state,
        active=found.active,
        preserved=state.preserved + found.preserved,
        retiring=state.retiring + found.retire,
        last_preserved_timestamp=found.last_preserved,
    )


def recover(state: State, now: float) -> State:
    """What a manager manages that was made at wall-clock time ``now`` (epoch seconds) and finds ``state``.

    After the clock went back, checkpoints that are no younger than the last preserved one are not managed any more:
    they move to ``preserved``, because keeping is the harmless mistake. Pages ``to_recover`` must be at hand.
    """
    if not (state.active or state.preserved or state.pages):
        return msgspec.structs.replace(state, last_preserved_timestamp=now - _FIRST_SLACK)
    last = min(state.last_preserved_timestamp, now)
    managed = [record for record in state.active if min(record.time, now) > last]
    orphans = [record for record in state.active if min(record.time, now) <= last]
    return msgspec.structs.replace(
        state,
        active=tuple(_clamped(record, now) for record in managed),
        preserved=(*state.preserved, *orphans),
        last_preserved_timestamp=last,
        pages=tuple(_recovered(page, last, now) for page in state.pages),
    )


def to_recover(state: State, now: float) -> Iterator[PageRef]:
    """Pages of which ``recover`` leaves some records among the managed ones, and not others."""
    last = min(state.last_preserved_timestamp, now)
    return (page for page in state.pages if page.of == "active" and page.times[0] <= last < min(page.times[1], now))


def _recovered(page: PageRef, last: float, now: float) -> PageRef:
    """As with records: those of a page that is no younger than ``last`` are preserved; no other is of the future."""
    if page.of == "active" and min(page.times[1], now) <= last:
        return msgspec.structs.replace(page, of="preserved")
    if page.of == "active" and page.times[1] > now:
        return msgspec.structs.replace(page, times=(min(page.times[0], now), now))
    return page


def _clamped(record: CheckpointRecord, now: float) -> CheckpointRecord:
    return record if record.time <= now else msgspec.structs.replace(record, time=now)
