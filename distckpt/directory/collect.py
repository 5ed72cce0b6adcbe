"""``distckpt gc``: what dead writers, readers and processes have left in a directory, found and deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from distckpt.directory.by_hand import Hand, check_nothing_sealed, is_recent
from distckpt.directory.contents import objects_of_attempt
from distckpt.directory.garbage import (
    SWEPT,
    Bounds,
    Leftover,
    Predecessors,
    attempt_folders,
    dead,
    delete_attempt,
    dropped_pages,
    leftover,
    lost_reports,
    old_probes,
)
from distckpt.directory.leases import UNREADABLE_SECONDS, Leases
from distckpt.directory.log import Tail
from distckpt.directory.pages import known
from distckpt.directory.pins import pins
from distckpt.directory.strays import read_run
from distckpt.errors import DamagedError, StorageError
from distckpt.format import names
from distckpt.storage import ObjectInfo, Store, SupportsHidden, SupportsSweep, join

ATTEMPT = "unfinished save"
RETIRED = "retired checkpoint"
HIDDEN = "interrupted write"
LEASE = "expired lease"
PROBE = "probe"
PAGE = "page of the log"
REPORT = "report on what is gone"


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that can go. ``kind`` says what it is, in words; ``folder`` is where it lies, which may be hidden."""

    kind: str
    left: Leftover
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Collection:
    """What was ``found``; and ``later``: what may be of a job that runs, so that it is left alone unless forced.

    ``tail`` is the log as it was then.
    """

    tail: Tail
    found: tuple[Garbage, ...]
    later: tuple[Garbage, ...]


def survey(store: Store, min_age: float, now: float) -> Collection:
    """Everything that is garbage by the coordinator's own rules and at least ``min_age`` seconds old. Changes nothing.

    What the newest coordinator has begun may still be committed, however old it is: that is for ``later``. DamagedError if
    the newest entries of the log cannot be read: then nobody knows what is needed; LogMissingError if there is no log.
    ``now`` is in epoch seconds.
    """
    tail = read_run(store)
    if tail.damaged:
        raise DamagedError(
            join(store.url, tail.damaged[0].path),
            "the newest entries of the log cannot be read, so nothing is deleted. Start the job, which goes on from the "
            "newest one that can",
        )
    attempts = _Attempts(store, tail, min_age)
    found: list[Garbage] = []
    later: list[Garbage] = []
    for folder in attempt_folders(store):
        found += _hidden(store, folder, now - min_age)
        found += attempts.abandoned(folder)
        later += attempts.of_the_newest(folder)
        # A job that runs deletes them itself, and knows who restores one of them just now.
        (later if is_recent(tail, now) else found).extend(attempts.retired(folder))
    for folder in SWEPT:
        found += _hidden(store, folder, now - min_age)
    found += [Garbage(PROBE, left) for left in old_probes(store, min_age)]
    found += [Garbage(REPORT, left) for left in attempts.lost_reports()]
    found += [Garbage(LEASE, leftover(store, info.path, [info])) for info in attempts.dead_leases(now)]
    found += [Garbage(LEASE, left) for left in attempts.lost_pins(now - min_age)]
    epoch = tail.entry.epoch if tail.entry is not None else 0
    for kept, before in ((found, epoch), (later, epoch + 1)):
        pages = [info for info in dropped_pages(store, before) if info.modified < now - min_age]
        known_already = {one.left.path for one in found}
        kept += [Garbage(PAGE, leftover(store, info.path, [info])) for info in pages if info.path not in known_already]
    return Collection(tail, tuple(found), tuple(later))


def delete(
    store: Store, garbage: Iterable[Garbage], min_age: float, done: Callable[[Garbage], object] = bool
) -> dict[str, str]:
    """Delete what ``survey`` has found; why something could not be, by its path. ``done`` is told of each that is gone."""
    failed: dict[str, str] = {}
    swept: set[str] = set()
    for one in garbage:
        try:
            if one.kind in (ATTEMPT, RETIRED):
                delete_attempt(one.left.store, one.left.path)
            elif one.kind != HIDDEN:
                one.left.store.delete(one.left.path)
            elif isinstance(store, SupportsSweep) and one.folder not in swept:
                swept.add(one.folder)
                store.sweep(one.folder, min_age)
        except (StorageError, DamagedError) as error:
            failed[one.left.path] = str(error)
        else:
            done(one)
    return failed


def turn_away(store: Store, tail: Tail, now: float) -> None:
    """Claim the directory, so that what its last coordinator has begun can never be committed. Fences a job that runs.

    Raises CoordinatorError if the last coordinator has left a save that only lacks its entry, and what ``Hand.write``
    raises. ``now`` is in epoch seconds.
    """
    check_nothing_sealed(store, tail)
    Hand(store, tail, "gc").write("claim", tail.head, now)


class _Attempts:
    """Which attempts are garbage, as the coordinator sees it."""

    def __init__(self, store: Store, tail: Tail, min_age: float) -> None:
        self._store = store
        self._min_age = min_age
        self._known = known(store, tail.head)
        self._epoch = tail.entry.epoch if tail.entry is not None else 0
        self._retiring = {record.attempt for record in tail.head.retiring}
        self._leases = Leases(store)
        self._leased, self._expired = self._leases.look()
        self._predecessors = Predecessors(store)
        self._predecessors.look()

    def abandoned(self, folder: str) -> Iterator[Garbage]:
        """What coordinators before the newest have begun."""
        yield from self._dead(folder, self._epoch)

    def retired(self, folder: str) -> Iterator[Garbage]:
        """What the log has let go, and nobody reads or has pinned."""
        attempt = folder.rpartition("/")[2]
        if attempt in self._retiring and not self._leased.failed and attempt not in self._leased.attempts:
            yield Garbage(RETIRED, leftover(self._store, folder, list(objects_of_attempt(self._store, folder))))

    def of_the_newest(self, folder: str) -> Iterator[Garbage]:
        """What would be garbage if the newest coordinator were not there any more."""
        if names.attempt_epoch(folder.rpartition("/")[2]) == self._epoch:
            yield from self._dead(folder, self._epoch + 1)

    def dead_leases(self, now: float) -> Iterator[ObjectInfo]:
        yield from self._expired
        yield from (info for info in self._leases.unreadable if info.modified < now - UNREADABLE_SECONDS)

    def lost_reports(self) -> list[Leftover]:
        """Reports on what the log has let go."""
        return lost_reports(self._store, Bounds(self._known, frozenset(), self._epoch), self._min_age)

    def lost_pins(self, before: float) -> Iterator[Leftover]:
        """Pins of what is no more, and those that came too late for it and whose maker was killed before it saw that."""
        for attempt, lease in pins(self._store).items():
            is_lost = attempt not in self._known or (attempt in self._retiring and not lease.holds)
            if is_lost and lease.since < before:
                yield Leftover(self._store, names.pin_path(attempt), 0, lease.since)

    def _dead(self, folder: str, epoch: int) -> Iterator[Garbage]:
        bounds = Bounds(self._known, frozenset(), epoch)
        left = dead(self._store, folder, bounds, self._min_age, self._predecessors)
        if left is not None:
            yield Garbage(ATTEMPT, left)


def _hidden(store: Store, folder: str, before: float) -> Iterator[Garbage]:
    if isinstance(store, SupportsHidden):
        for info in store.hidden(folder):
            if info.modified <= before:
                yield Garbage(HIDDEN, leftover(store, info.path, [info]), folder)
