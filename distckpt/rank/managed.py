"""Which checkpoints a run manages: those that take part in retention."""

from __future__ import annotations

from distckpt.coordinator.machine.retention import recover
from distckpt.coordinator.messages import RunOpened
from distckpt.directory.log import read_tail
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store


def managed(store: Store, found: RunOpened) -> tuple[CheckpointRecord, ...]:
    """Those of the run that ``found`` some when it was opened, oldest first, read from storage."""
    state = read_tail(store).state
    if (state.run, state.saves) != (found.run, 0) or found.recovers_at is None:
        return state.active
    # Until its first save the log does not say yet which of those that it found a manager leaves alone.
    return recover(state, found.recovers_at).active
