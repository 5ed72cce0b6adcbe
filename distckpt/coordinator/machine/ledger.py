"""The machine's hold on the log: it claims an epoch, then appends one entry at a time, until a newer epoch fences it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distckpt.coordinator.machine.actions import (
    Append,
    Appended,
    AppendRefused,
    AppendUnknown,
    DeleteReports,
    NameTaken,
    NewestRead,
    PageWritten,
    ReadNewest,
    ReadTail,
    TailRead,
)
from distckpt.coordinator.machine.desk import Desk, Identities
from distckpt.coordinator.machine.intentions import BeginRun, Claim, Commit, Confirm, Intention
from distckpt.coordinator.machine.library import Library
from distckpt.coordinator.machine.making import Job, Making
from distckpt.coordinator.machine.retention import recover
from distckpt.errors import CoordinatorError, DamagedError, DistckptError, FencedError
from distckpt.format.json.log import FORMAT, Entry, State
from distckpt.format.json.paging import Sizes
from distckpt.format.json.report import Reported, with_reports
from distckpt.format.names import LOG

FIRST_RETRY = 0.5
LAST_RETRY = 10.0
EMPTY_LOOKS = 3
"""Looks that find no entry, one after the other, until the log counts as lost."""


@dataclass(frozen=True, slots=True)
class _Flight:
    intention: Intention
    entry: Entry
    folded: tuple[Reported, ...]


class Ledger:
    """The newest counted entry, and the way to the next one.

    ``follow_up`` is called with each intention when its entry counts, or with None instead of an entry when there was
    nothing left to change, or only something to make sure of; only then is the next intention applied. ``give_up`` is
    called with one whose entry no reader would take, and with the reason. ``ended`` is why this machine may never append
    again (FencedError; DamagedError for an unreadable log; CoordinatorError for a claim that cannot be written), or None.
    ``whole`` is False when newer entries than the one it started from could not be read. ``tries`` counts how often it was
    not known what became of the entry in flight; ``doubt`` is why the latest look at the log, or attempt at an entry, made
    nothing sure.
    """

    def __init__(
        self,
        desk: Desk,
        identities: Identities,
        follow_up: Callable[[Intention | Confirm, Entry | None], None],
        give_up: Callable[[Intention, str], None],
        library: Library,
        sizes: Sizes,
    ) -> None:
        self.entry: Entry | None = None
        self.ended: DistckptError | None = None
        self.whole = True
        self.tries = 0
        self.doubt = ""
        self._desk = desk
        self._identities = identities
        self._follow_up = follow_up
        self._give_up = give_up
        self._library = library
        self._making = Making(desk, identities, library, sizes)
        self._wanted: deque[Intention | Confirm] = deque()
        self._flight: _Flight | None = None
        self._confirming: Confirm | None = None
        self._retry_at: float | None = None
        self._backoff = FIRST_RETRY
        self._empty_looks = 0
        self._recover_at: float | None = None
        self._reports: tuple[Reported, ...] = ()

    @property
    def leading(self) -> bool:
        """Whether the epoch is claimed."""
        return self.entry is not None

    @property
    def state(self) -> State:
        """The state of the newest counted entry."""
        return self.entry.state if self.entry is not None else State()

    @property
    def epoch(self) -> int:
        """The claimed epoch, or 0."""
        return self.entry.epoch if self.entry is not None else 0

    @property
    def busy(self) -> bool:
        """Whether an entry is in flight or waits to be, or the log is looked at."""
        return self._flight is not None or self._confirming is not None or self._making.busy or bool(self._wanted)

    @property
    def sound(self) -> State:
        """``state`` without the pages that cannot be read."""
        return self._library.sound(self.state)

    @property
    def seen(self) -> State:
        """The state to which the last intention was applied, with all that it needed of pages at hand."""
        return self._making.seen

    @property
    def dropped(self) -> frozenset[str]:
        """Pages of this epoch to which no entry refers any more."""
        return self._making.dropped(self.state, *([self._flight.entry.state] if self._flight is not None else []))

    @property
    def has_saved(self) -> bool:
        """Whether anything was committed since the present manager was made."""
        return self.leading and self._recover_at is None

    @property
    def deadline(self) -> float | None:
        """When to append, or to look, again after an unknown outcome."""
        return self._retry_at

    @property
    def is_lost(self) -> bool:
        """Whether looks have found no entry at all, several times over, where there must be one."""
        return self._empty_looks >= EMPTY_LOOKS

    def start(self) -> None:
        """Begin to claim."""
        self._desk.emit(ReadTail())

    @property
    def recovers_at(self) -> float | None:
        """When the present manager was made, in epoch seconds, if it has not committed anything yet; else None.

        It recovers what it finds as TensorFlow's manager does (``retention.recover``): in the log from the first commit
        on. Until then the log stays as it is, so a clock that was wrong while nothing was saved leaves no trace.
        """
        return self._recover_at

    @property
    def reported(self) -> State:
        """``sound``, with what has been reported since the newest entry."""
        return with_reports(self.sound, (one.report for one in self._reports))

    def fold(self, reports: tuple[Reported, ...]) -> None:
        """Have the next entry, whatever it is for, say what has been reported; then the reports are deleted."""
        self._reports = reports

    def intend(self, intention: Intention) -> None:
        """Append an entry once those before it are counted, made from the state that there is then."""
        self._wanted.append(intention)
        self._append_next()

    def confirm(self, what: Confirm) -> None:
        """Make sure, after the entries that wait, that the log has nothing newer than what this machine knows."""
        self._wanted.append(what)
        self._empty_looks = 0
        if self._confirming is not None and self._retry_at is not None:
            self._retry_at, self._backoff = self._desk.mono, FIRST_RETRY
        self._append_next()

    def withdraw(self, attempt: str) -> None:
        """An attempt is not to be committed any more. An entry in flight cannot be called back."""
        commits = [one for one in self._wanted if isinstance(one, Commit) and one.record.attempt == attempt]
        for commit in commits:
            self._wanted.remove(commit)

    def tail_read(self, tail: TailRead) -> None:
        """Claim the epoch after the newest one."""
        if self.leading or self._flight is not None or self._making.busy or self.ended is not None:
            return
        if tail.entry is None and tail.seq > 0:
            self.ended = DamagedError(f"{self._desk.directory}/{LOG}", "no entry of the log can be read")
            return
        old = tail.entry
        damaged = tail.seq - old.seq if old is not None else 0
        self.whole = damaged == 0
        state = old.state if old is not None else recover(State(), self._desk.now)
        # Every unreadable entry may have been a claim.
        epoch = (old.epoch if old is not None else 0) + damaged + 1
        claim = Claim(tail.complete, self._identities.commit())
        self._make(claim, state, tail.seq + 1, epoch)

    def page_written(self, event: PageWritten) -> None:
        """What waited for the page goes on."""
        self._making.page_written(event)

    def go_on(self) -> None:
        """Append what waits, now that pages have come or gone."""
        self._append_next()

    def appended(self, event: Appended) -> None:
        """The entry is there. It counts only if nothing newer is: names of pruned entries can be created again."""
        if self._is_ours(event.entry):
            self._landed(event.entry, event.newest)

    def name_taken(self, event: NameTaken) -> None:
        """Something is there: our own entry, after a lost acknowledgement, or another coordinator's."""
        if not self._is_ours(event.entry):
            return
        if event.found is not None and event.found.commit_id == event.entry.commit_id:
            self._landed(event.entry, event.newest)
        elif self.leading:
            self._fenced(event.found.epoch if event.found is not None else 0)
        else:
            self._ground()
            self._desk.emit(ReadTail())

    def append_unknown(self, event: AppendUnknown) -> None:
        """Try the very same entry again, later; until then nothing else is appended."""
        if self._is_ours(event.entry):
            self._again(event.reason)

    def append_refused(self, event: AppendRefused) -> None:
        """The state stays as it is; what else waits may still be appended."""
        flight = self._flight
        if flight is None or not self._is_ours(event.entry):
            return
        self._ground()
        if self.leading:
            self._give_up(flight.intention, event.reason)
            self._append_next()
        else:
            self.ended = CoordinatorError(f"{self._desk.directory}: cannot be claimed: {event.reason}")

    def newest_read(self, event: NewestRead) -> None:
        """It is sure that nothing is newer; or another coordinator has taken over; or it is to be looked again."""
        confirming, entry = self._confirming, self.entry
        if confirming is None or entry is None or self.ended is not None:
            return
        if event.newest is None or event.newest < entry.seq:
            self._empty_looks += event.newest == 0
            lost = f"a listing shows no entry after {event.newest}, and {entry.seq} was written"
            self._look_again(event.reason or lost)
        elif event.newest > entry.seq:
            self._fenced(0)
        else:
            self._ground()
            self._follow_up(confirming, None)
            self._append_next()

    def tick(self) -> None:
        """Append, or look, again if it is time."""
        if self._retry_at is None or self._retry_at > self._desk.mono:
            return
        self._retry_at = None
        if self._flight is not None:
            self._desk.emit(Append(self._flight.entry))
        elif self._confirming is not None:
            self._desk.emit(ReadNewest())

    def _is_ours(self, entry: Entry) -> bool:
        return self._flight is not None and self._flight.entry.commit_id == entry.commit_id and self.ended is None

    def _landed(self, entry: Entry, newest: int) -> None:
        if newest > entry.seq:
            self._fenced(0)
        elif newest < entry.seq:
            # A listing that does not show what was just written says nothing about what else it does not show.
            self._again("it was written, and a listing does not show it")
        else:
            self._counted(entry)

    def _counted(self, entry: Entry) -> None:
        flight = self._flight
        assert flight is not None
        self._ground()
        self.entry = entry
        if flight.folded:
            self._reports = tuple(one for one in self._reports if one not in flight.folded)
            self._desk.emit(DeleteReports(flight.folded))
        if entry.kind == "commit":
            self._recover_at = None
        self._follow_up(flight.intention, entry)
        self._append_next()

    def _again(self, reason: str) -> None:
        self.tries += 1
        self._look_again(reason)

    def _look_again(self, reason: str) -> None:
        self.doubt = reason
        self._retry_at = self._desk.mono + self._backoff
        self._backoff = min(LAST_RETRY, 2 * self._backoff)

    def _ground(self) -> None:
        self._flight = self._confirming = None
        self.tries, self.doubt, self._empty_looks = 0, "", 0
        self._retry_at = None
        self._backoff = FIRST_RETRY

    def _fenced(self, newer: int) -> None:
        # Who pruned the log this far does not leave its epoch behind; it is a later one than ours.
        epoch = self._flight.entry.epoch if self._flight is not None else self.epoch
        self.ended = FencedError(self._desk.directory, epoch, max(newer, epoch + 1))
        self._ground()
        self._making.stop()
        self._wanted.clear()

    def _append_next(self) -> None:
        while self.entry is not None and not self._engaged and self._wanted:
            intention = self._wanted.popleft()
            if isinstance(intention, Confirm):
                self._confirming = intention
                self._desk.emit(ReadNewest())
                return
            self._make(intention, self.entry.state, self.entry.seq + 1, self.entry.epoch)

    @property
    def _engaged(self) -> bool:
        return self._flight is not None or self._confirming is not None or self._making.busy

    def _make(self, intention: Intention, state: State, seq: int, epoch: int) -> None:
        def then(changed: State | None, folded: tuple[Reported, ...]) -> None:
            if changed is None:
                self._follow_up(intention, None)
            else:
                self._fly(intention, seq, epoch, changed, folded)

        recovers = isinstance(intention, Commit) and intention.retention.keep is None  # rules need nothing of this
        self._making.make(Job(intention, state, epoch, self._recover_at if recovers else None, self._reports, then))

    def _fly(self, intention: Intention, seq: int, epoch: int, state: State, folded: tuple[Reported, ...]) -> None:
        if isinstance(intention, Claim | BeginRun):
            self._recover_at = self._desk.now
        entry = Entry(FORMAT, seq, epoch, intention.kind, self._desk.now, self._identities.commit(), state)
        self._flight = _Flight(intention, entry, folded)
        self._desk.emit(Append(entry))
