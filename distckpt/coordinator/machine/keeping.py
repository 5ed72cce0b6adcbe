"""Retention and clean-up at work: it is read who needs what, the log says what retires, and only then are objects deleted."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordinator.machine.actions import (
    CollectGarbage,
    Delete,
    Deleted,
    LeasesRead,
    ReadLeases,
    SkipsTold,
    TellSkips,
)
from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.following import Followed
from distckpt.coordinator.machine.intentions import Forget, Reprieve, Retire
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.restores import Restores
from distckpt.coordinator.machine.retention import NOBODY, Sweep, next_due, sweep
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import Accepted, Lag
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.report import Reported

LOOK_AGAIN = 30.0
LAG_AGAIN = 2.0
"""How often it is looked whether a group has caught up for which a save waits."""

GARBAGE_PAUSES = (20.0, 100.0, 600.0)
"""Seconds to the next look, the last for ever after. What must be seen unchanged for a while goes in a short life, too."""


class Keeping:
    """Applies retention to what is committed.

    A reader writes its lease, then makes sure that the checkpoint is not retiring; we retire, then read the leases,
    then delete. So either the reader sees the retirement or we see its lease. A group of readers that lags is told what it
    does not get before that retires.
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
        self._followed = NOBODY
        self._telling = False
        self._reports_at: float | None = None
        self._deleting: frozenset[str] = frozenset()
        self._garbage_wanted = False
        self._garbage_at: float | None = None
        self._garbage_pauses = list(GARBAGE_PAUSES)
        self._in_need: dict[int, None] = {}
        self._helped: dict[int, None] = {}
        self._helping = False

    @property
    def busy(self) -> bool:
        """Whether leases are being read or objects deleted."""
        return self.looking or self._telling or bool(self._deleting)

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

    @property
    def followed(self) -> Followed:
        """What groups of readers wanted when it was looked last; nothing if that could not be read."""
        return self._followed

    def lag(self, saving: int) -> Lag | None:
        """The group for which the next save waits, with so many under way; then it is looked again soon."""
        found = self._followed.lag(self._ledger.state, saving)
        if found is not None:
            soon = self._desk.mono + LAG_AGAIN
            self._look_at = soon if self._look_at is None else min(soon, self._look_at)
        return found

    def deadlines(self) -> Iterator[float]:
        """When to look again, in monotonic seconds."""
        return (at for at in (self._look_at, self._garbage_at, self._reports_at) if at is not None)

    def peek(self) -> None:
        """Learn who reads what, so that the commit that is about to come can retire what makes room for it."""
        self._leased = None
        if self._looking is None:
            self._looking = frozenset()
            self._read()

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
        self._followed = event.followed
        if event.failed:
            self._look_later()
        else:
            spared = event.attempts | self._restores.protected
            self._ledger.fold(event.reports)
            self._reprieve(event.pinned)
            self._retire(spared)
            self._delete(retiring, spared, event.reports)

    def skips_told(self, event: SkipsTold) -> None:
        """Retire what no group waits for any more; or try again later."""
        self._telling = False
        if event.done:
            self.look()
        else:
            self._look_later()

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
        if self._reports_at is not None and self._reports_at <= self._desk.mono:
            self._reports_at = None
            self._look_wanted = True
        if self._look_wanted and not self.busy:
            self._look_wanted = False
            self._looking = frozenset(record.attempt for record in self._ledger.state.retiring)
            self._read()
        if self._garbage_wanted and self._runs.current is not None:
            self._collect(self._runs.current)
        if self._in_need and not self._helping and self._runs.current is not None:
            self._help(self._runs.current)

    def _read(self) -> None:
        run = self._runs.current
        keep = run.retention.keep if run is not None else None
        self._desk.emit(ReadLeases(self._ledger.state, keep.groups if keep is not None else frozenset()))

    def _look_later(self) -> None:
        self._look_at = self._desk.mono + LOOK_AGAIN

    def _reprieve(self, pinned: frozenset[str]) -> None:
        """A pin that holds was there before its checkpoint retired, so that nothing of it can have been deleted."""
        back = pinned & {record.attempt for record in self._ledger.state.retiring} - self._deleting
        if back:
            self._ledger.intend(Reprieve(back))

    def _retire(self, spared: frozenset[str]) -> None:
        """Nothing retires before the run's first commit: a manager that is only made deletes nothing."""
        run, state, followed = self._runs.current, self._ledger.reported, self._followed
        if run is None or not self._ledger.has_saved:
            return

        def swept(spared: frozenset[str], followed: Followed) -> Sweep:
            return sweep(state.active, run.retention, state.last_preserved_timestamp, spared, followed, state.pages)

        free = swept(spared, followed)
        if len(free.active) > len(swept(frozenset(), followed.at_rest(state)).active):
            self._look_later()
        if free.evicts or next_due(state, run.retention) is not None:
            self._ledger.intend(Retire(run.number, run.retention, spared, followed))
        self._skip(swept(spared, followed.without_surplus()).retire)
        if run.retention.keep is not None and run.retention.keep.metrics and not run.deserted:
            self._reports_at = self._desk.mono + LOOK_AGAIN

    def _skip(self, due: tuple[CheckpointRecord, ...]) -> None:
        """Groups that lag, and want what is due, are told that they do not get it; it retires once they are."""
        skips = {
            group.group: gone
            for group in self._followed.groups
            if (gone := tuple(record for record in due if record.attempt in group.surplus))
        }
        if skips and not self._telling:
            self._telling = True
            self._desk.emit(TellSkips(skips))

    def _delete(self, retiring: frozenset[str], spared: frozenset[str], reports: tuple[Reported, ...]) -> None:
        records = [record for record in self._ledger.state.retiring if record.attempt in retiring]
        free = tuple(record for record in records if record.attempt not in spared)
        if len(free) < len(records):
            self._look_later()
        if free:
            self._deleting = frozenset(record.attempt for record in free)
            self._desk.emit(Delete(free, tuple(one.path for one in reports if one.report.attempt in self._deleting)))

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
        pause, *self._garbage_pauses = self._garbage_pauses if self._garbage_pauses else GARBAGE_PAUSES[-1:]
        self._garbage_at = self._desk.mono + pause
        if self._ledger.whole:
            self._desk.emit(self._garbage(run, urgent=False))

    def _garbage(self, run: Run, *, urgent: bool) -> CollectGarbage:
        ledger, failed = self._ledger, frozenset(self._book.failed)
        known, pages = ledger.state.known(), ledger.state.pages
        live, dropped = self._book.live, ledger.dropped
        return CollectGarbage(run.name, known, live, ledger.epoch, failed, urgent, pages, dropped)
