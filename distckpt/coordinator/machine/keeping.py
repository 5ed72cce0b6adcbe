"""Retention and clean-up at work: leases are read, the log says what retires, and only then are objects deleted."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordinator.machine.actions import CollectGarbage, Delete, Deleted, LeasesRead, ReadLeases
from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.intentions import Forget, Reprieve, Retire
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.restores import Restores
from distckpt.coordinator.machine.retention import next_due, sweep
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import Accepted

LOOK_AGAIN = 30.0
GARBAGE_EVERY = 600.0


class Keeping:
    """Applies retention to what is committed.

    A reader writes its lease, then makes sure that the checkpoint is not retiring; we retire, then read the leases,
    then delete. So either the reader sees the retirement or we see its lease.
    """

    def __init__(self, desk: Desk, ledger: Ledger, runs: Runs, restores: Restores, book: RoundBook) -> None:
        self._desk = desk
        self._ledger = ledger
        self._runs = runs
        self._restores = restores
        self._book = book
        self._look_wanted = False
        self._look_at: float | None = None
        self._looking: frozenset[str] | None = None
        self._leased: frozenset[str] | None = None
        self._deleting: frozenset[str] = frozenset()
        self._garbage_wanted = False
        self._garbage_at: float | None = None
        self._in_need: dict[int, None] = {}
        self._helped: dict[int, None] = {}
        self._helping = False

    @property
    def busy(self) -> bool:
        """Whether leases are being read or objects deleted."""
        return self.looking or bool(self._deleting)

    @property
    def looking(self) -> bool:
        """Whether leases are being read."""
        return self._looking is not None

    @property
    def owes(self) -> bool:
        """Whether something that is due could not be retired or deleted yet."""
        return self._look_at is not None

    @property
    def spared(self) -> frozenset[str] | None:
        """Attempts that somebody reads or restores. None if the leases could not be read since the last peek."""
        return None if self._leased is None else self._leased | self._restores.protected

    def deadlines(self) -> Iterator[float]:
        """When to look again, in monotonic seconds."""
        return (at for at in (self._look_at, self._garbage_at) if at is not None)

    def peek(self) -> None:
        """Learn who reads what, so that the commit that is about to come can retire what makes room for it."""
        self._leased = None
        if self._looking is None:
            self._looking = frozenset()
            self._desk.emit(ReadLeases())

    def look(self) -> None:
        """See what is due, at the end of this step."""
        self._look_wanted = True

    def collect(self) -> None:
        """Collect garbage, at the end of this step."""
        self._garbage_wanted = True

    def make_room(self, ticket: int) -> None:
        """The store is full: collect garbage that is young too, at the end of this step, and answer when that is done."""
        self._desk.hold(ticket, self._in_need, None)

    def room_made(self) -> None:
        """Answer those who had asked when the collection began. For the others there is another one."""
        self._desk.answer_shelf(self._helped, Accepted())
        self._helping = False

    def leases_read(self, event: LeasesRead) -> None:
        """Retire what is due and free; delete what was retiring before the leases were read and is free."""
        if self._looking is None:
            return
        retiring, self._looking = self._looking, None
        self._leased = None if event.failed else event.attempts
        if event.failed:
            self._look_later()
        else:
            spared = event.attempts | self._restores.protected
            self._reprieve(event.pinned)
            self._retire(spared)
            self._delete(retiring, spared)

    def deleted(self, event: Deleted) -> None:
        """Forget what is gone. The rest is tried again later."""
        gone = frozenset(event.attempts) & self._deleting
        if gone != self._deleting:
            self._look_later()
        self._deleting = frozenset()
        if gone:
            self._ledger.intend(Forget(gone))

    def tick(self) -> None:
        """Look and collect if it is time or if it was asked for."""
        if self._look_at is not None and self._look_at <= self._desk.mono:
            self._look_at = None
            self._look_wanted = True
        if self._garbage_at is not None and self._garbage_at <= self._desk.mono:
            self._garbage_wanted = True
        if self._look_wanted and not self.busy:
            self._look_wanted = False
            self._looking = frozenset(record.attempt for record in self._ledger.state.retiring)
            self._desk.emit(ReadLeases())
        if self._garbage_wanted and self._runs.current is not None:
            self._collect(self._runs.current)
        if self._in_need and not self._helping and self._runs.current is not None:
            self._help(self._runs.current)

    def _look_later(self) -> None:
        self._look_at = self._desk.mono + LOOK_AGAIN

    def _reprieve(self, pinned: frozenset[str]) -> None:
        """A pin that holds was there before its checkpoint retired, so that nothing of it can have been deleted."""
        back = pinned & {record.attempt for record in self._ledger.state.retiring} - self._deleting
        if back:
            self._ledger.intend(Reprieve(back))

    def _retire(self, spared: frozenset[str]) -> None:
        """Nothing retires before the run's first commit: a manager that is only made deletes nothing."""
        run, state = self._runs.current, self._ledger.sound
        if run is None or not self._ledger.has_saved:
            return
        free = sweep(state.active, run.retention, state.last_preserved_timestamp, spared, state.pages)
        due = sweep(state.active, run.retention, state.last_preserved_timestamp, frozenset(), state.pages)
        if len(free.active) > len(due.active):
            self._look_later()
        if free.evicts or next_due(state, run.retention) is not None:
            self._ledger.intend(Retire(run.number, run.retention, spared))

    def _delete(self, retiring: frozenset[str], spared: frozenset[str]) -> None:
        records = [record for record in self._ledger.state.retiring if record.attempt in retiring]
        free = tuple(record for record in records if record.attempt not in spared)
        if len(free) < len(records):
            self._look_later()
        if free:
            self._deleting = frozenset(record.attempt for record in free)
            self._desk.emit(Delete(free))

    def _help(self, run: Run) -> None:
        if not self._ledger.whole:
            self._desk.answer_shelf(self._in_need, Accepted())
            return
        for ticket in list(self._in_need):
            self._desk.forget(ticket)
            self._desk.hold(ticket, self._helped, None)
        self._helping = True
        self._desk.emit(self._garbage(run, urgent=True))

    def _collect(self, run: Run) -> None:
        self._garbage_wanted = False
        self._garbage_at = self._desk.mono + GARBAGE_EVERY
        if self._ledger.whole:
            self._desk.emit(self._garbage(run, urgent=False))

    def _garbage(self, run: Run, *, urgent: bool) -> CollectGarbage:
        ledger, failed = self._ledger, frozenset(self._book.failed)
        known, pages = ledger.state.known(), ledger.state.pages
        live, dropped = self._book.live, ledger.dropped
        return CollectGarbage(run.name, known, live, ledger.epoch, failed, urgent, pages, dropped)
