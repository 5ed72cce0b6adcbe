"""Which checkpoints stay, decided without any clock: on eviction, as TensorFlow's manager does, or anew each time by rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.machine.following import Followed
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.paging import place
from distckpt.keep import Retention, Rule

_FIRST_SLACK = 1.0
NOBODY = Followed()


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
    followed: Followed = NOBODY,
    pages: Sequence[PageRef] = (),
) -> Sweep:
    """Evict what no rule keeps; without rules, whatever is older, by save order, than the newest ``max_to_keep``.

    By rules nothing is preserved, and what a report that cannot be read is on stays. Without, an evicted checkpoint is
    preserved if it is at least ``keep_checkpoint_every_n_hours`` younger than the last preserved one, else retired. The
    newest, pinned ones, those in ``spared`` (attempts) and those that groups of readers want stay active; they take no
    place of a younger one, so the newest ``max_to_keep`` always stay. Times are epoch seconds. What is younger than
    something in one of ``pages`` waits until that has been read (``next_due``).
    """
    spared = spared | followed.held
    news = frozenset(record.attempt for record in active if followed.is_news(record))
    if retention.keep is not None:
        unclear = spared | followed.unclear | news
        return _judge(active, retention.keep, last_preserved, unclear, followed, [p for p in pages if p.of == "active"])
    spared |= news
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


def _judge(
    active: Sequence[CheckpointRecord],
    keep: Rule,
    last_preserved: float,
    spared: frozenset[str],
    followed: Followed,
    pages: Sequence[PageRef],
) -> Sweep:
    """Of what a rule keeps of all it keeps no less of the oldest alone: so these can be judged before pages are read."""
    first = min((page.first for page in pages), default=None)
    judged = [record for record in active if first is None or place(record) < first]
    kept = spared | keep.keeps(judged, followed.pending)
    retire = tuple(record for record in judged if not (record.attempt in kept or record.pinned or record is active[-1]))
    gone = {record.attempt for record in retire}
    return Sweep(tuple(record for record in active if record.attempt not in gone), (), retire, last_preserved)


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
    """The page with the oldest active records, if some of them may be kept no longer."""
    pages = [page for page in state.pages if page.of == "active"]
    if keeps_all(retention) or not pages:
        return None
    oldest = min(pages, key=lambda page: page.first)
    newer = sum(page.count for page in pages) - 1 + sum(place(record) > oldest.first for record in state.active)
    is_due = retention.keep is not None or newer >= math.floor(retention.max_to_keep or 0)
    return oldest if is_due else None


def keeps_all(retention: Retention) -> bool:
    """Whether nothing is ever evicted, so that active records may go into pages."""
    return retention.keep is None and not retention.max_to_keep


def swept(state: State, retention: Retention, spared: frozenset[str], followed: Followed = NOBODY) -> State | None:
    """``state`` after a sweep: what is evicted is preserved or retires. None if that is nothing."""
    found = sweep(state.active, retention, state.last_preserved_timestamp, spared, followed, state.pages)
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
