"""The newest checkpoint, for a reader on its own."""

from __future__ import annotations

import math

from distckpt.directory.lease import HeldLease
from distckpt.directory.log import sequence_numbers
from distckpt.directory.newest import newest_there
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError
from distckpt.evaluation.deliveries import Delivery, Unclaimed
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import Store


class KnownLog:
    """The log as it was read last: a look is a listing, and more only if it has grown.

    While there is none, it is looked for checkpoints without one too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seq = 0
        self.state = State()

    def look(self) -> State:
        """How it stands now. LogMissingError if there are checkpoints and no log, DamagedError if it cannot be read."""
        seq = max(sequence_numbers(self._store), default=0)
        if seq != self._seq or not seq:
            self.state = read_run(self._store).state
            self._seq = seq
        return self.state


class Newest:
    """Gets the newest one that it has not had."""

    def __init__(self, store: Store, worker: str, lease_seconds: float) -> None:
        self._store = store
        self.worker = worker
        self._seconds = lease_seconds
        self._log = KnownLog(store)
        self._last = ""

    def get(self) -> Delivery | None:
        """See Source."""
        record = self._next(self._log.look())
        if record is None:
            return None
        try:
            lease = HeldLease.take(self._store, record.attempt, self.worker, self._seconds)
        except CheckpointNotFoundError:
            return None  # it has retired meanwhile, so there is another one
        self._last = record.attempt
        return Delivery(record, lease, 1, Unclaimed())

    def _next(self, state: State) -> CheckpointRecord | None:
        newest = state.newest()
        if newest is None or newest.attempt == self._last:
            return None
        found = newest_there(self._store, state)
        return found if found is not None and found.attempt != self._last else None

    def is_drained(self) -> bool:
        """See Source."""
        return self._log.state.ended

    def pause(self) -> float:
        """See Source."""
        return math.inf
