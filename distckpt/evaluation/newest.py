"""The newest checkpoint, for a reader on its own."""

from __future__ import annotations

import math

from distckpt.directory.lease import HeldLease
from distckpt.directory.log import Tail, sequence_numbers
from distckpt.directory.newest import newest_there
from distckpt.directory.sharing import may_want
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError
from distckpt.evaluation.deliveries import Delivery, Unclaimed
from distckpt.format.json.group import GroupState
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import Store


class KnownLog:
    """The log as it was read last: a look is a listing, and more only if it has grown.

    While there is none, it is looked for checkpoints without one too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seq = 0
        self._tail = Tail(0, None)
        self._opened: tuple[int, frozenset[str]] | None = None
        self.state = State()

    def tail(self) -> Tail:
        """Its end. Raises as ``look``."""
        seq = max(sequence_numbers(self._store), default=0)
        if seq != self._seq or not seq:
            self._tail = read_run(self._store)
            self._seq = seq
            self.state = self._tail.head
        return self._tail

    def look(self, group: GroupState | None = None) -> State:
        """How it stands now, with all that the group may want, if it is known, at hand.

        LogMissingError if there are checkpoints and no log, DamagedError if it cannot be read.
        """
        tail = self.tail()
        pages = [page for page in tail.head.pages if group is None or may_want(group, tail.head, page)]
        wanted = (tail.seq, frozenset(page.id for page in pages))
        if wanted != self._opened or self._opened is None:
            self.state = tail.having(lambda page: group is None or may_want(group, tail.head, page))
            self._opened = wanted
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
        tail = self._log.tail()
        while (record := self._next(tail)) is not None:
            try:
                lease = HeldLease.take(self._store, record.attempt, self.worker, self._seconds)
            except CheckpointNotFoundError:  # retired since the log was read: there may be another one
                before, tail = tail, self._log.tail()
                if tail is before:
                    return None
                continue
            self._last = record.attempt
            return Delivery(record, lease, 1, Unclaimed())
        return None

    def _next(self, tail: Tail) -> CheckpointRecord | None:
        newest = tail.newest()
        if newest is None or newest.attempt == self._last:
            return None
        found = newest_there(self._store, tail)
        return found if found is not None and found.attempt != self._last else None

    def is_drained(self) -> bool:
        """See Source."""
        return self._log.state.ended

    def pause(self) -> float:
        """See Source."""
        return math.inf
