"""The machine's hold on the log: it claims an epoch, then appends one entry at a time, until a newer epoch fences it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distckpt.coordinator.machine.actions import Append, Appended, AppendUnknown, NameTaken, ReadTail, TailRead
from distckpt.coordinator.machine.desk import Desk, Identities
from distckpt.coordinator.machine.records import rolled_forward
from distckpt.coordinator.machine.retention import recover
from distckpt.errors import DamagedError, DistckptError, FencedError
from distckpt.format.json.log import FORMAT, Entry, Kind, State
from distckpt.format.names import LOG

FIRST_RETRY = 0.5
LAST_RETRY = 10.0

Change = Callable[[State], State | None]
Then = Callable[[Entry], None]


@dataclass(frozen=True, slots=True)
class _Intention:
    kind: Kind
    change: Change
    then: Then


@dataclass(frozen=True, slots=True)
class _Flight:
    entry: Entry
    then: Then


class Ledger:
    """The newest counted entry, and the way to the next one.

    ``ended`` is why this machine may never append again (FencedError; DamagedError for an unreadable log), or None.
    ``whole`` is False when newer entries than the one it started from could not be read.
    """

    def __init__(self, desk: Desk, identities: Identities, on_lead: Then) -> None:
        self.entry: Entry | None = None
        self.ended: DistckptError | None = None
        self.whole = True
        self._desk = desk
        self._identities = identities
        self._on_lead = on_lead
        self._wanted: deque[_Intention] = deque()
        self._flight: _Flight | None = None
        self._unsure = False
        self._retry_at: float | None = None
        self._backoff = FIRST_RETRY
        self._recover_at: float | None = None

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
    def unsure(self) -> bool:
        """Whether the store has not said what became of the entry in flight."""
        return self._unsure

    @property
    def busy(self) -> bool:
        """Whether an entry is in flight or waits to be."""
        return self._flight is not None or bool(self._wanted)

    @property
    def has_saved(self) -> bool:
        """Whether anything was committed since the present manager was made."""
        return self.leading and self._recover_at is None

    @property
    def deadline(self) -> float | None:
        """When to append again after an unknown outcome."""
        return self._retry_at

    def start(self) -> None:
        """Begin to claim."""
        self._desk.emit(ReadTail())

    def manager_made(self) -> None:
        """What there is now is recovered as TensorFlow's manager does it: in the log from the first commit on.

        Until then the log stays as it is, so a clock that was wrong while nothing was saved leaves no trace.
        """
        self._recover_at = self._desk.now

    def recovered(self, state: State) -> State:
        """``state``, that of the newest entry, as the present manager sees it."""
        return state if self._recover_at is None else recover(state, self._recover_at)

    def intend(self, kind: Kind, change: Change, then: Then) -> None:
        """Append an entry once those before it are counted.

        ``change`` makes its state from the state at that moment, or returns None when there is nothing left to do;
        ``then`` is called when the entry counts.
        """
        self._wanted.append(_Intention(kind, change, then))
        self._append_next()

    def tail_read(self, tail: TailRead) -> None:
        """Claim the epoch after the newest one."""
        if self.leading or self._flight is not None or self.ended is not None:
            return
        if tail.entry is None and tail.seq > 0:
            self.ended = DamagedError(f"{self._desk.directory}/{LOG}", "no entry of the log can be read")
            return
        old = tail.entry
        damaged = tail.seq - old.seq if old is not None else 0
        self.whole = damaged == 0
        self.manager_made()
        state = rolled_forward(old.state, tail.complete) if old is not None else recover(State(), self._desk.now)
        # Every unreadable entry may have been a claim.
        epoch = (old.epoch if old is not None else 0) + damaged + 1
        self._fly(self._entry("claim", tail.seq + 1, epoch, state), self._on_lead)

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
            self._again()

    def tick(self) -> None:
        """Append again if it is time."""
        if self._retry_at is not None and self._retry_at <= self._desk.mono and self._flight is not None:
            self._retry_at = None
            self._desk.emit(Append(self._flight.entry))

    def _is_ours(self, entry: Entry) -> bool:
        return self._flight is not None and self._flight.entry.commit_id == entry.commit_id and self.ended is None

    def _landed(self, entry: Entry, newest: int) -> None:
        if newest > entry.seq:
            self._fenced(0)
        elif newest < entry.seq:
            # A listing that does not show what was just written says nothing about what else it does not show.
            self._again()
        else:
            self._counted(entry)

    def _counted(self, entry: Entry) -> None:
        flight = self._flight
        assert flight is not None
        self._ground()
        self.entry = entry
        if entry.kind == "commit":
            self._recover_at = None
        flight.then(entry)
        self._append_next()

    def _again(self) -> None:
        self._unsure = True
        self._retry_at = self._desk.mono + self._backoff
        self._backoff = min(LAST_RETRY, 2 * self._backoff)

    def _ground(self) -> None:
        self._flight = None
        self._unsure = False
        self._retry_at = None
        self._backoff = FIRST_RETRY

    def _fenced(self, newer: int) -> None:
        # Who pruned the log this far does not leave its epoch behind; it is a later one than ours.
        epoch = self._flight.entry.epoch if self._flight is not None else self.epoch
        self.ended = FencedError(self._desk.directory, epoch, max(newer, epoch + 1))
        self._ground()
        self._wanted.clear()

    def _append_next(self) -> None:
        while self.entry is not None and self._flight is None and self._wanted:
            wanted = self._wanted.popleft()
            state = wanted.change(self.entry.state)
            if state is not None:
                entry = self._entry(wanted.kind, self.entry.seq + 1, self.entry.epoch, state)
                self._fly(entry, wanted.then)

    def _entry(self, kind: Kind, seq: int, epoch: int, state: State) -> Entry:
        commit_id = self._identities.commit()
        return Entry(FORMAT, seq, epoch, kind, self._desk.now, commit_id, state)

    def _fly(self, entry: Entry, then: Then) -> None:
        self._flight = _Flight(entry, then)
        self._desk.emit(Append(entry))
