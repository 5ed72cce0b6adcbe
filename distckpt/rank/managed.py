"""Which checkpoints a run manages: those that take part in retention."""

from __future__ import annotations

from distckpt.coordinator.messages import RunOpened
from distckpt.directory.log import read_tail
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store


def managed(store: Store, found: RunOpened) -> tuple[CheckpointRecord, ...]:
    """Those of the run that ``found`` some when it was opened, oldest first, read from storage."""
    state = read_tail(store).state
    if (state.run, state.saves) != (found.run, 0):
        return state.active
    # Until its first save the log does not say yet which of those that it found a manager leaves alone.
    attempts = {record.attempt for record in found.checkpoints}
    return tuple(record for record in state.active if record.attempt in attempts)
