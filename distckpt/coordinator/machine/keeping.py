"""Retention and clean-up at work: leases are read, the log says what retires, and only then are objects deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distckpt.coordinator.machine.actions import CollectGarbage, Delete, Deleted, LeasesRead, Publish, ReadLeases
from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.records import forgotten, retired
from distckpt.coordinator.machine.retention import Sweep, sweep
from distckpt.coordinator.machine.runs import Run
from distckpt.format.json.log import Entry, State

LOOK_AGAIN = 30.0
GARBAGE_EVERY = 600.0
PATIENCE = 5.0
"""How long a commit waits for the leases. Without them it retires nothing, which comes later then."""


class Keeping:
    """Applies retention to what is committed.

    A reader writes its lease, then makes sure that the checkpoint is not retiring; we retire, then read the leases,
    then delete. So either the reader sees the retirement or we see its lease. ``protected`` are the attempts that are
    being restored; ``live`` and ``failed`` those of unfinished and of failed saves.
    """

    def __init__(
        self,
        desk: Desk,
        ledger: Ledger,
        protected: Callable[[], frozenset[str]],
        live: Callable[[], frozenset[str]],
        failed: Callable[[], frozenset[str]],
    ) -> None:
        self._desk = desk
        self._ledger = ledger
        self._protected = protected
        self._live = live
        self._failed = failed
        self._run: Run | None = None
        self._look_wanted = False
        self._look_at: float | None = None
        self._looking: frozenset[str] | None = None
        self._leased: frozenset[str] | None = None
        self._waiting: list[Callable[[], None]] = []
        self._wait_until: float | None = None
        self._deleting: frozenset[str] = frozenset()
        self._garbage_wanted = False
        self._garbage_at: float | None = None

    @property
    def busy(self) -> bool:
        """Whether leases are being read or objects deleted."""
        return self._looking is not None or bool(self._deleting)

    @property
    def owes(self) -> bool:
        """Whether something that is due could not be retired or deleted yet."""
        return self._look_at is not None

    def deadlines(self) -> Iterator[float]:
        """When to look again, or to wait no longer, in monotonic seconds."""
        return (at for at in (self._look_at, self._garbage_at, self._wait_until) if at is not None)

    def begin_run(self, run: Run) -> None:
        """Apply this run's settings from now on."""
        self._run = run
        self.collect()

    def peek(self) -> None:
        """Learn who reads what, so that the commit that is about to come can retire what makes room for it."""
        self._leased = None
        if self._looking is None:
            self._looking = frozenset()
            self._desk.emit(ReadLeases())

    def when_known(self, then: Callable[[], None]) -> None:
        """Call ``then`` once no leases are being read any more, at once if none are; in any case before long."""
        if self._looking is None:
            then()
            return
        self._waiting.append(then)
        if self._wait_until is None:
            self._wait_until = self._desk.mono + PATIENCE

    def swept(self, state: State) -> State:
        """``state`` after a sweep; unchanged if the leases could not be read since the last peek: then it comes later."""
        if self._leased is None:
            return state
        swept = self._sweep(state, self._leased | self._protected())
        if swept is None:
            return state
        return retired(state, swept.active, swept.preserved, swept.retire, swept.last_preserved)

    def look(self) -> None:
        """See what is due, at the end of this step."""
        self._look_wanted = True

    def collect(self) -> None:
        """Collect garbage, at the end of this step."""
        self._garbage_wanted = True

    def leases_read(self, event: LeasesRead) -> None:
        """Retire what is due and free; delete what was retiring before the leases were read and is free."""
        if self._looking is None:
            return
        retiring, self._looking = self._looking, None
        self._leased = None if event.failed else event.attempts
        if event.failed:
            self._look_later()
        else:
            self._retire(event.attempts)
            self._delete(retiring, event.attempts)
        self._go_on()

    def _go_on(self) -> None:
        waiting, self._waiting, self._wait_until = self._waiting, [], None
        for then in waiting:
            then()

    def deleted(self, event: Deleted) -> None:
        """Forget what is gone. The rest is tried again later."""
        gone = frozenset(event.attempts) & self._deleting
        if gone != self._deleting:
            self._look_later()
        self._deleting = frozenset()
        if gone:
            self._ledger.intend("forget", lambda state: forgotten(state, gone), lambda _: None)

    def tick(self) -> None:
        """Look and collect if it is time or if it was asked for."""
        if self._wait_until is not None and self._wait_until <= self._desk.mono:
            self._go_on()
        if self._look_at is not None and self._look_at <= self._desk.mono:
            self._look_at = None
            self._look_wanted = True
        if self._garbage_at is not None and self._garbage_at <= self._desk.mono:
            self._garbage_wanted = True
        if self._look_wanted and not self.busy:
            self._look_wanted = False
            self._looking = frozenset(record.attempt for record in self._ledger.state.retiring)
            self._desk.emit(ReadLeases())
        if self._garbage_wanted and self._run is not None:
            self._collect(self._run)

    def _look_later(self) -> None:
        self._look_at = self._desk.mono + LOOK_AGAIN

    def _sweep(self, state: State, leased: frozenset[str]) -> Sweep | None:
        """What would change, or None if nothing."""
        if self._run is None:
            return None
        swept = sweep(state.active, self._run.retention, state.last_preserved_timestamp, leased)
        return swept if swept.retire or swept.preserved else None

    def _retire(self, leased: frozenset[str]) -> None:
        """Nothing retires before the run's first commit: a manager that is only made deletes nothing."""
        if not self._ledger.has_saved:
            return
        state = self._ledger.state
        protected = leased | self._protected()
        free, all_due = self._sweep(state, protected), self._sweep(state, frozenset())
        if all_due is not None and (free is None or len(free.active) > len(all_due.active)):
            self._look_later()
        if free is None:
            return

        def change(state: State) -> State | None:
            now = self._sweep(state, leased | self._protected())
            if now is None:
                return None
            return retired(state, now.active, now.preserved, now.retire, now.last_preserved)

        self._ledger.intend("retire", change, self._retired)

    def _retired(self, entry: Entry) -> None:
        self._desk.emit(Publish(entry))
        self.look()

    def _delete(self, retiring: frozenset[str], leased: frozenset[str]) -> None:
        spared = leased | self._protected()
        records = [record for record in self._ledger.state.retiring if record.attempt in retiring]
        free = tuple(record for record in records if record.attempt not in spared)
        if len(free) < len(records):
            self._look_later()
        if free:
            self._deleting = frozenset(record.attempt for record in free)
            self._desk.emit(Delete(free))

    def _collect(self, run: Run) -> None:
        self._garbage_wanted = False
        self._garbage_at = self._desk.mono + GARBAGE_EVERY
        if self._ledger.whole:
            known = self._ledger.state.known()
            self._desk.emit(CollectGarbage(run.name, known, self._live(), self._ledger.epoch, self._failed()))
