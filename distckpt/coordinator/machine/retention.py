"""Which checkpoints stay. Decided on eviction only, as TensorFlow's CheckpointManager does, and without any clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.messages import Retention
from distckpt.format.json.log import CheckpointRecord, State

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
    active: Sequence[CheckpointRecord], retention: Retention, last_preserved: float, spared: frozenset[str]
) -> Sweep:
    """Evict whatever is older, by save order, than the newest ``max_to_keep``.

    An evicted checkpoint is preserved if it is at least ``keep_checkpoint_every_n_hours`` younger than the last
    preserved one, else retired. The newest, pinned ones and those in ``spared`` (attempts) stay active; they take
    no place of a younger one, so the newest ``max_to_keep`` always stay. Times are epoch seconds.
    """
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


def swept(state: State, retention: Retention, spared: frozenset[str]) -> State | None:
    """``state`` after a sweep: what is evicted is preserved or retires. None if that is nothing."""
    found = sweep(state.active, retention, state.last_preserved_timestamp, spared)
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
