"""Which checkpoints stay, decided without any clock: on eviction, as TensorFlow's manager does, or anew each time by rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.machine.following import Followed
from distckpt.format.json.log import CheckpointRecord, State
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
) -> Sweep:
    """Evict what no rule keeps; without rules, whatever is older, by save order, than the newest ``max_to_keep``.

    By rules nothing is preserved, and what a report that cannot be read is on stays. Without, an evicted checkpoint is
    preserved if it is at least ``keep_checkpoint_every_n_hours`` younger than the last preserved one, else retired. The
    newest, pinned ones, those in ``spared`` (attempts) and those that groups of readers want stay active; they take no
    place of a younger one, so the newest ``max_to_keep`` always stay. Times are epoch seconds.
    """
    spared = spared | followed.held
    news = frozenset(record.attempt for record in active if followed.is_news(record))
    if retention.keep is not None:
        return _judge(active, retention.keep, last_preserved, spared | followed.unclear | news, followed)
    spared |= news
    keep = retention.max_to_keep
    if not keep:
        return Sweep(tuple(active), (), (), last_preserved)
    spacing = (retention.keep_checkpoint_every_n_hours or 0.0) * 3600.0
    stay, preserved, retire = [], [], []
    due = max(0, min(len(active) - math.floor(keep), len(active) - 1))
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
    active: Sequence[CheckpointRecord], keep: Rule, last_preserved: float, spared: frozenset[str], followed: Followed
) -> Sweep:
    kept = spared | keep.keeps(active, followed.pending)
    stay: list[CheckpointRecord] = []
    retire: list[CheckpointRecord] = []
    for record in active:
        stays = record.attempt in kept or record.pinned or record is active[-1]
        (stay if stays else retire).append(record)
    return Sweep(tuple(stay), (), tuple(retire), last_preserved)


def swept(state: State, retention: Retention, spared: frozenset[str], followed: Followed = NOBODY) -> State | None:
    """``state`` after a sweep: what is evicted is preserved or retires. None if that is nothing."""
    found = sweep(state.active, retention, state.last_preserved_timestamp, spared, followed)
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
    they move to ``preserved``, because keeping is the harmless mistake.
    """
    if not (state.active or state.preserved):
        return msgspec.structs.replace(state, last_preserved_timestamp=now - _FIRST_SLACK)
    last = min(state.last_preserved_timestamp, now)
    managed = [record for record in state.active if min(record.time, now) > last]
    orphans = [record for record in state.active if min(record.time, now) <= last]
    return msgspec.structs.replace(
        state,
        active=tuple(_clamped(record, now) for record in managed),
        preserved=(*state.preserved, *orphans),
        last_preserved_timestamp=last,
    )


def _clamped(record: CheckpointRecord, now: float) -> CheckpointRecord:
    return record if record.time <= now else msgspec.structs.replace(record, time=now)
