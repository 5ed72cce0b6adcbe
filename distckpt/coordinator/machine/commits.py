"""The last stretch of a save: sealing, then the log entry that makes it a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from distckpt.coordinator.machine.actions import Publish, Seal, Sealed
from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.keeping import Keeping
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.records import committed, discarded, never_committed
from distckpt.coordinator.machine.rounds import SaveRound
from distckpt.coordinator.machine.runs import Run
from distckpt.coordinator.messages import Committed, Refused
from distckpt.errors import CommitUnknownError
from distckpt.format.json.log import CheckpointRecord, Entry, State


class Commits:
    """Seals rounds and commits them. ``on_committed`` gets the round and what to answer its ranks."""

    def __init__(
        self, desk: Desk, ledger: Ledger, keeping: Keeping, on_committed: Callable[[SaveRound, Committed], None]
    ) -> None:
        self._desk = desk
        self._ledger = ledger
        self._keeping = keeping
        self._on_committed = on_committed

    def seal(self, round: SaveRound, run: Run) -> None:
        """Have everything checked and the manifest written. From here on no deadline abandons the round."""
        round.seal_begins(self._desk.now)
        assert round.plan is not None
        assert round.number is not None
        self._desk.emit(
            Seal(
                attempt=round.attempt,
                name=run.name,
                number=round.number,
                epoch=self._ledger.epoch,
                time=round.time,
                plan=round.plan,
                receipts=round.receipts,
                hosts=dict(run.hosts),
            )
        )

    def commit(self, round: SaveRound, name: str, sealed: Sealed) -> None:
        """Append the entry that commits a sealed round and retires what it takes the place of."""
        assert round.number is not None
        record = CheckpointRecord(
            name=name,
            number=round.number,
            attempt=round.attempt,
            manifest_size=sealed.manifest_size,
            manifest_crc32c=sealed.manifest_crc32c,
            time=round.time,
            world_size=round.world_size,
            nbytes=sealed.nbytes,
        )

        def change(state: State) -> State | None:
            if round.over:
                return None
            return self._keeping.swept(committed(self._ledger.recovered(state), record, round.order + 1))

        def counted(entry: Entry) -> None:
            self._on_committed(round, Committed(record))
            self._desk.emit(Publish(entry))

        self._keeping.when_known(lambda: self._ledger.intend("commit", change, counted))

    def discard(self, round: SaveRound, name: str) -> None:
        """Log that a round which failed while it was being sealed will never be a checkpoint; then it is deleted.

        Its manifest may be on storage all the same, and without this entry the next coordinator would roll it forward.
        """
        record = never_committed(name, round.number or 0, round.attempt, round.time, round.world_size)
        self._ledger.intend("retire", lambda state: discarded(state, record), lambda _: self._keeping.look())

    def overdue(self, round: SaveRound, timeout: float) -> None:
        """Tell who waits that the store does not say what became of the log entry. It is retried all the same."""
        if self._ledger.unsure:
            reason = f"the store has not said within {timeout:g} s whether its log entry was written; it is retried"
            self._desk.answer_shelf(round.awaiting_end, Refused(CommitUnknownError(round.number, reason)))
