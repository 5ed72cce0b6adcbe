"""What waits for its turn in the log, as data: each says which state comes of it. What follows then, the machine says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from distckpt.coordinator.machine.following import Followed
from distckpt.coordinator.machine.records import committed, find_number
from distckpt.coordinator.machine.retention import NOBODY, next_due, swept
from distckpt.coordinator.messages import OpenRun
from distckpt.format.json.log import CheckpointRecord, Kind, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.paging import Records
from distckpt.format.names import attempt_age
from distckpt.keep import Retention

Need = tuple[PageRef, Callable[[CheckpointRecord], bool] | None]
"""A page that has to be read first; its records must be at hand if this holds for one of them, or (None) in any case."""


def _of_number(state: State, number: int, *lists: str) -> Iterator[Need]:
    """Pages of these lists that may have the number."""
    pages = (page for page in state.pages if page.of in lists and page.may_have_number(number))
    return ((page, lambda record: record.number == number) for page in pages)


def _due(state: State, retention: Retention) -> Iterator[Need]:
    page = next_due(state, retention)
    return iter(() if page is None else ((page, None),))


@dataclass(frozen=True, slots=True)
class Claim:
    """A coordinator begins. ``complete`` are checkpoints that a dead one had sealed but not committed.

    ``origin`` becomes that of a log that has none.
    """

    kind: ClassVar[Kind] = "claim"
    complete: tuple[CheckpointRecord, ...]
    origin: str

    def needs(self, state: State) -> Iterator[Need]:
        """Pages that may have checkpoints whose place they take."""
        for record in self.complete:
            yield from _of_number(state, record.number, "active")

    def apply(self, state: State) -> State:
        """Commit them in the order in which they had begun.

        A save that began before the newest checkpoint was passed over: it failed for the ranks, and does not come
        back. Clocks have no say in this.
        """
        known = state.known()
        last = attempt_age(state.active[-1].attempt) if state.active else (0, "")
        for record in sorted(self.complete, key=lambda record: attempt_age(record.attempt)):
            if record.attempt not in known and attempt_age(record.attempt) > last:
                state = committed(state, record, state.saves)
        return msgspec.structs.replace(state, origin=state.origin or self.origin)


@dataclass(frozen=True, slots=True)
class BeginRun:
    """A new incarnation of the job takes over. ``first`` is its first process to report."""

    kind: ClassVar[Kind] = "run"
    first: OpenRun

    def needs(self, state: State) -> Iterator[Need]:
        """No page."""
        return iter(())

    def apply(self, state: State) -> State:
        """Its number is larger than that of every run before it. One that the log has lost keeps its own."""
        number = max(state.run + 1, self.first.run)
        return msgspec.structs.replace(state, run=number, run_token=self.first.token, saves=0, ended=False)


@dataclass(frozen=True, slots=True)
class Commit:
    """A sealed save becomes a checkpoint, the last of ``saves`` saves of its run.

    What has to make room for it retires with the same entry, except ``spared`` attempts and what ``followed`` says that
    groups want. None: it is not known which those are, so nothing retires yet.
    """

    kind: ClassVar[Kind] = "commit"
    record: CheckpointRecord
    saves: int
    retention: Retention
    spared: frozenset[str] | None
    followed: Followed = NOBODY

    def needs(self, state: State) -> Iterator[Need]:
        """Pages that may have one of the same number, and the one from which something is due."""
        yield from _of_number(state, self.record.number, "active")
        yield from _due(state, self.retention) if self.spared is not None else ()

    def apply(self, state: State) -> State:
        """It is the newest checkpoint, and one of the same name and number makes room for it."""
        state = committed(state, self.record, self.saves)
        if self.spared is None:
            return state
        return swept(state, self.retention, self.spared, self.followed) or state


@dataclass(frozen=True, slots=True)
class Discard:
    """A save that failed while it was being sealed will never be a checkpoint, and is to be deleted.

    Its manifest may be on storage all the same, and without this entry the next coordinator would roll it forward.
    """

    kind: ClassVar[Kind] = "retire"
    record: CheckpointRecord

    def needs(self, state: State) -> Iterator[Need]:
        """Pages that may know it."""
        pages = (page for page in state.pages if page.may_have_attempt(self.record.attempt))
        return ((page, lambda record: record.attempt == self.record.attempt) for page in pages)

    def apply(self, state: State) -> State | None:
        """It is among the retiring, if the state does not know it already."""
        if self.record.attempt in state.known():
            return None
        return msgspec.structs.replace(state, retiring=(*state.retiring, self.record))


@dataclass(frozen=True, slots=True)
class Retire:
    """What retention does not keep may not be opened any more, except ``spared`` attempts and what groups want."""

    kind: ClassVar[Kind] = "retire"
    run: int
    retention: Retention
    spared: frozenset[str]
    followed: Followed = NOBODY

    def needs(self, state: State) -> Iterator[Need]:
        """The page from which something is due. What is due of the others waits for its turn."""
        return _due(state, self.retention) if state.run == self.run else iter(())

    def apply(self, state: State) -> State | None:
        """Nothing changes once another run has begun, which deletes nothing before its first commit."""
        return swept(state, self.retention, self.spared, self.followed) if state.run == self.run else None


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left of those retiring attempts."""

    kind: ClassVar[Kind] = "forget"
    attempts: frozenset[str]

    def needs(self, state: State) -> Iterator[Need]:
        """No page: nothing in them is retiring."""
        return iter(())

    def apply(self, state: State) -> State | None:
        """The state knows them no more."""
        left = tuple(record for record in state.retiring if record.attempt not in self.attempts)
        return msgspec.structs.replace(state, retiring=left) if len(left) < len(state.retiring) else None


@dataclass(frozen=True, slots=True)
class SetPin:
    """Somebody, who waits at ``ticket``, wants a number ``pinned`` or not. ``name`` decides if several have it."""

    kind: ClassVar[Kind] = "pin"
    ticket: int
    number: int
    name: str
    pinned: bool

    def needs(self, state: State) -> Iterator[Need]:
        """Pages that may have the number."""
        return _of_number(state, self.number, "active", "preserved")

    def apply(self, state: State) -> State | None:
        """The newest record of the number is pinned; or none of its records is."""
        if self.pinned:
            newest = find_number(state, self.number, self.name)
            changed = {newest.attempt} if newest is not None and not newest.pinned else set()
        else:
            alive = state.alive().values()
            changed = {record.attempt for record in alive if record.number == self.number and record.pinned}
        if not changed:
            return None
        active, preserved = self._set(state.active, changed), self._set(state.preserved, changed)
        return msgspec.structs.replace(state, active=active, preserved=preserved)

    def _set(self, records: Records, changed: set[str]) -> Records:
        return tuple(
            msgspec.structs.replace(record, pinned=self.pinned) if record.attempt in changed else record
            for record in records
        )


@dataclass(frozen=True, slots=True)
class Reprieve:
    """Checkpoints that retired although somebody had pinned them: the pin came after the leases had been read."""

    kind: ClassVar[Kind] = "pin"
    attempts: frozenset[str]

    def needs(self, state: State) -> Iterator[Need]:
        """No page: nothing in them is retiring."""
        return iter(())

    def apply(self, state: State) -> State | None:
        """They are preserved, as another one may have their number by now. What was never committed stays retiring."""
        back = tuple(record for record in state.retiring if record.attempt in self.attempts and record.manifest_size)
        if not back:
            return None
        left = tuple(record for record in state.retiring if record not in back)
        return msgspec.structs.replace(state, preserved=(*state.preserved, *back), retiring=left)


@dataclass(frozen=True, slots=True)
class End:
    """Every rank of ``run`` has said that training is over."""

    kind: ClassVar[Kind] = "end"
    run: int

    def needs(self, state: State) -> Iterator[Need]:
        """No page."""
        return iter(())

    def apply(self, state: State) -> State | None:
        """So it is, unless another run has begun."""
        if state.run != self.run or state.ended:
            return None
        return msgspec.structs.replace(state, ended=True)


@dataclass(frozen=True, slots=True)
class Confirm:
    """Nothing is to be logged, only made sure of: that the log has nothing newer. ``asked`` says for whom."""

    asked: int

    def apply(self, state: State) -> None:
        """Nothing changes."""


Intention = Claim | BeginRun | Commit | Discard | Retire | Forget | SetPin | Reprieve | End
