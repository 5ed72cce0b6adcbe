"""A simulated store that is perfect in itself; faults lie in how its users reach it. Plus the plans of simulated saves."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from msgspec.structs import replace

from distckpt.errors import PlanError
from distckpt.format.json.group import GroupEntry
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.paging import Records, opened
from distckpt.testing.history import (
    INDEX,
    MANIFEST,
    Content,
    Erased,
    GroupLogged,
    History,
    Logged,
    LostPage,
    Whole,
    Wrote,
)


class Link(Protocol):
    """An entry of a chain."""

    @property
    def seq(self) -> int:
        """Its number."""

    @property
    def commit_id(self) -> str:
        """What is unique to it for ever."""


LinkT = TypeVar("LinkT", bound=Link)


class SimulatedChain(Generic[LinkT]):
    """Numbered entries, as ``directory.chain`` keeps them. ``landed`` hears of each: who, which, heard, overwrote.

    ``exclusive`` False breaks put-if-absent: entries are then overwritten, as on a store that the probe would refuse.
    """

    def __init__(self, landed: Callable[[str, LinkT, bool, bool], None], *, exclusive: bool = True) -> None:
        self.entries: dict[int, LinkT] = {}
        self._landed = landed
        self._exclusive = exclusive

    def newest(self) -> int:
        """The highest number, 0 if there is none."""
        return max(self.entries, default=0)

    def newest_entry(self) -> LinkT | None:
        """The entry with the highest number."""
        return self.entries.get(self.newest())

    def put(self, who: str, entry: LinkT, *, heard: bool = True) -> bool:
        """Create an entry if its number is free; whether it was."""
        taken = entry.seq in self.entries
        if taken and self._exclusive:
            return False
        self.entries[entry.seq] = entry
        self._landed(who, entry, heard, taken)
        return True

    def prune(self, below: int) -> None:
        """Drop entries with smaller numbers."""
        for seq in [seq for seq in self.entries if seq < below]:
            del self.entries[seq]


@dataclass(frozen=True, slots=True)
class Stored:
    """An object and when it was written, in simulated seconds."""

    content: Content
    written: float


@dataclass(frozen=True, slots=True)
class SimulatedLease:
    """A lease as it stands on the store, ``written`` when; ``expires`` is what its holder's wall clock would have it be."""

    attempt: str
    seconds: float
    beat: int
    expires: float
    written: float


class SimulatedStore:
    """The log and its pages, groups' chains, the objects of every attempt, and the leases.

    What changes is put down in ``history``.
    """

    def __init__(self, history: History, *, exclusive: bool = True) -> None:
        self.history = history
        self.log = SimulatedChain[Entry](self._logged, exclusive=exclusive)
        self.groups: dict[str, SimulatedChain[GroupEntry]] = {}
        self.attempts: dict[str, dict[str, Stored]] = {}
        self.leases: dict[str, SimulatedLease] = {}
        self.pages: dict[str, Records] = {}

    def group(self, name: str) -> SimulatedChain[GroupEntry]:
        """A group's chain, empty if there is no such group."""
        if name not in self.groups:
            history = self.history
            self.groups[name] = SimulatedChain[GroupEntry](lambda *what: history.add(GroupLogged(name, *what)))
        return self.groups[name]

    def _logged(self, who: str, entry: Entry, heard: bool, overwrote: bool) -> None:
        is_newest = entry.seq == self.log.newest() and not overwrote  # what a sleeper puts below it counts for nobody
        state = self.whole(who if is_newest else "", entry.state)
        self.history.add(Logged(who, replace(entry, state=state), heard, overwrote, len(entry.state.pages)))

    def whole(self, who: str, state: State) -> State:
        """The state with what is in its pages; ``who``, if it is somebody, must find them."""
        for page in state.pages:
            if who and page.id not in self.pages:
                self.history.add(LostPage(who, page.id))
        return opened(state, self.pages)

    def put_page(self, page: str, records: Records) -> None:
        """Create a page, if there is none."""
        self.pages.setdefault(page, records)

    def referred(self) -> set[str]:
        """The pages to which the entries refer that are there."""
        return {page.id for entry in self.log.entries.values() for page in entry.state.pages}

    def erase_page(self, who: str, page: str) -> None:
        """Delete a page. Nobody may miss it."""
        if page in self.referred():
            self.history.add(LostPage(who, page))
        self.pages.pop(page, None)

    def put(self, attempt: str, name: str, content: Content, time: float) -> None:
        """Create an object of an attempt."""
        objects = self.attempts.setdefault(attempt, {})
        self.history.add(Wrote(attempt, name, content, name in objects))
        objects[name] = Stored(content, time)

    def put_if_absent(self, attempt: str, name: str, content: Content, time: float) -> None:
        """Create an object of an attempt if there is none, as a request that comes a second time does."""
        if name not in self.attempts.get(attempt, {}):
            self.put(attempt, name, content, time)

    def get(self, attempt: str, name: str) -> Content | None:
        """An object's content, or None."""
        stored = self.attempts.get(attempt, {}).get(name)
        return stored.content if stored is not None else None

    def erase(self, who: str, attempt: str, name: str) -> None:
        """Delete an object; nothing happens if there is none."""
        if self.attempts.get(attempt, {}).pop(name, None) is not None:
            self.history.add(Erased(who, attempt, name))

    def names(self, attempt: str) -> list[str]:
        """The objects of an attempt, manifest first."""
        return sorted(self.attempts.get(attempt, {}), key=lambda name: (name != MANIFEST, name))

    def drop_lease(self, id: str) -> None:
        """Delete a lease; nothing happens if there is none."""
        self.leases.pop(id, None)

    def complete(self, attempt: str) -> Whole | None:
        """What the manifest says, if it, the index and all shards are there."""
        whole = self.get(attempt, MANIFEST)
        if not isinstance(whole, Whole) or self.get(attempt, INDEX) is None:
            return None
        return whole if all(self.get(attempt, str(rank)) is not None for rank in whole.rows) else None


@dataclass(frozen=True, slots=True)
class SimulatedPlan:
    """Every rank holds the same ``chunks``; ``owned`` are those that each writes. Satisfies ``actions.Plan``."""

    plan_id: str
    owned: tuple[bytes, ...]
    chunks: int

    @property
    def world_size(self) -> int:
        """How many ranks it covers."""
        return len(self.owned)

    def rows(self, rank: int) -> bytes:
        """What the rank writes: int32, little endian."""
        return self.owned[rank]

    def row_count(self, rank: int) -> int:
        """How many rows that is."""
        return len(self.owned[rank]) // 4


def describe(chunks: int) -> bytes:
    """What a rank holds: ``chunks`` chunks, all of them also held by every other rank."""
    return str(chunks).encode()


def make_plan(
    number: int | None, descriptions: Mapping[int, bytes], staged: Mapping[int, bytes], spin: str
) -> SimulatedPlan:
    """Spread the chunks over the ranks, another way for every ``spin``; staged ranks write what they have copied."""
    held = {int(description) for description in descriptions.values()}
    if len(held) > 1:
        raise PlanError(number, "model", sorted(descriptions), "ranks hold different numbers of chunks")
    chunks = held.pop()
    owner: dict[int, int] = {}
    for rank, rows in staged.items():
        for chunk in memoryview(rows).cast("i"):
            if owner.setdefault(chunk, rank) != rank or chunk >= chunks:
                raise PlanError(number, f"chunk {chunk}", [rank, owner[chunk]], "copied twice")
    free = sorted(set(descriptions) - set(staged))
    for chunk in range(chunks):
        if chunk not in owner:
            if not free:
                raise PlanError(number, f"chunk {chunk}", sorted(staged), "nobody has copied it")
            owner[chunk] = free[hash_of(spin, chunk) % len(free)]
    owned = tuple(
        array.array("i", [chunk for chunk in range(chunks) if owner[chunk] == rank]).tobytes()
        for rank in range(len(descriptions))
    )
    plan_id = hashlib.sha256(repr((chunks, owned)).encode()).hexdigest()
    return SimulatedPlan(plan_id, owned, chunks)


def hash_of(*parts: object) -> int:
    """A number that depends on nothing but ``parts``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


def record_of(name: str, attempt: str, whole: Whole) -> CheckpointRecord:
    """The record of a complete attempt."""
    return CheckpointRecord(
        name=name,
        number=whole.number,
        attempt=attempt,
        manifest_size=1,
        manifest_crc32c=1,
        time=whole.time,
        world_size=len(whole.rows),
        nbytes=whole.chunks,
    )
