"""``distckpt gc``: what dead writers, readers and processes have left in a directory, found and deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from distckpt.directory.by_hand import Hand, check_nothing_sealed, is_by_hand
from distckpt.directory.contents import objects_of_attempt
from distckpt.directory.garbage import (
    Bounds,
    Leftover,
    Watch,
    attempt_folders,
    dead,
    dropped_pages,
    leftover,
    lost_reports,
    old_probes,
    other_folders,
    unfinished,
)
from distckpt.directory.garbage import delete as delete_leftover
from distckpt.directory.leases import Leased, Leases
from distckpt.directory.log import Tail
from distckpt.directory.pages import known
from distckpt.directory.pins import pins
from distckpt.directory.stillness import elapsed
from distckpt.directory.strays import read_run
from distckpt.directory.tags import tags
from distckpt.errors import DamagedError, StorageError
from distckpt.format import names
from distckpt.storage import ObjectInfo, Store, join

ATTEMPT = "unfinished save"
RETIRED = "retired checkpoint"
HIDDEN = "interrupted write"
LEASE = "expired lease"
LEASED = "lease"
PROBE = "probe"
PAGE = "page of the log"
PIN = "pin or tag of nothing"
REPORT = "report on what is gone"


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that can go. ``kind`` says what it is, in words."""

    kind: str
    left: Leftover


@dataclass(frozen=True, slots=True)
class Collection:
    """What was ``found``: nobody can need it. ``later``: what may be of a job that runs, so that it is left alone unless
    forced. ``unsure``: what goes if it is seen unchanged for another ``left.wait`` seconds, as somebody may be at it.

    ``tail`` is the log as it was then.
    """

    tail: Tail
    found: tuple[Garbage, ...]
    later: tuple[Garbage, ...]
    unsure: tuple[Garbage, ...]

    @property
    def wait(self) -> float:
        """In how many seconds nothing is unsure any more, if nobody touches it."""
        return max((one.left.wait for one in self.unsure), default=0.0)


class Survey:
    """Finds everything that is garbage by the coordinator's own rules, look after look. Changes nothing.

    What nobody may touch must be seen unchanged for ``min_age`` seconds by a monotonic clock, or as long as the rules say
    if that is less. So a first look is sure of little but what never was a checkpoint and never can be one.
    """

    def __init__(self, store: Store, min_age: float, clock: Callable[[], float] = elapsed) -> None:
        self._store = store
        self._min_age = min_age
        self._leases = Leases(store, clock)
        self._watch = Watch(store, clock)

    def look(self) -> Collection:
        """What there is now. What the newest coordinator has begun may still be committed, however long it is so.

        DamagedError if the newest entries of the log cannot be read: then nobody knows what is needed; LogMissingError if
        there is no log.
        """
        tail = read_run(self._store)
        if tail.damaged:
            raise DamagedError(
                join(self._store.url, tail.damaged[0].path),
                "the newest entries of the log cannot be read, so nothing is deleted. Start the job, which goes on from the "
                "newest one that can",
            )
        with self._watch.lock:
            self._watch.look()
            leased, expired = self._leases.look()
            attempts = _Attempts(self._store, tail, self._min_age, self._watch, leased)
            judged: list[Garbage] = []
            later: list[Garbage] = []
            for folder in attempt_folders(self._store):
                judged += attempts.hidden(folder)
                judged += attempts.abandoned(folder)
                later += attempts.of_the_newest(folder)
                # A job that runs deletes them itself, and knows who restores one of them just now.
                (judged if is_by_hand(tail) else later).extend(attempts.retired(folder))
            for folder in other_folders(self._store):
                judged += attempts.hidden(folder)
            judged += [Garbage(PROBE, left) for left in old_probes(self._min_age, self._watch)]
            dead_leases = (*expired, *self._leases.unreadable)
            judged += [Garbage(LEASE, leftover(self._store, info.path, [info])) for info in dead_leases]
            judged += [
                Garbage(LEASED, leftover(self._store, info.path, [info], wait))
                for info, wait in self._leases.counting.items()
            ]
            judged += [Garbage(PIN, left) for left in attempts.lost_pins()]
            judged += [Garbage(REPORT, left) for left in attempts.lost_reports()]
            for page, is_of_the_newest in attempts.pages():
                (later if is_of_the_newest else judged).append(page)
        found = tuple(one for one in judged if not one.left.wait)
        return Collection(tail, found, tuple(later), tuple(one for one in judged if one.left.wait))


def delete(garbage: Iterable[Garbage], done: Callable[[Garbage], object] = bool) -> dict[str, str]:
    """Delete what ``Survey`` has found; why something could not be, by its path. ``done`` is told of each that is gone."""
    failed: dict[str, str] = {}
    for one in garbage:
        try:
            delete_leftover(one.left)
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

    def __init__(self, store: Store, tail: Tail, min_age: float, watch: Watch, leased: Leased) -> None:
        self._store = store
        self._min_age = min_age
        self._watch = watch
        self._known = known(store, tail.head)
        self._epoch = tail.entry.epoch if tail.entry is not None else 0
        self._retiring = {record.attempt for record in tail.head.retiring}
        self._leased = leased

    def hidden(self, folder: str) -> Iterator[Garbage]:
        """Interrupted writes and uploads."""
        bounds = Bounds(self._known, frozenset(), self._epoch)
        for left in unfinished(folder, bounds, self._min_age, self._watch):
            yield Garbage(HIDDEN, left)

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

    def pages(self) -> Iterator[tuple[Garbage, bool]]:
        """Pages to which no entry refers; and whether the newest coordinator, if it is there, may be about to."""
        bounds = Bounds(self._known, frozenset(), self._epoch + 1)
        for left in dropped_pages(bounds, self._min_age, self._watch):
            page = names.page_id(left.path)
            yield Garbage(PAGE, left), page is not None and names.attempt_epoch(page) == self._epoch

    def lost_reports(self) -> list[Leftover]:
        """Reports on what the log has let go."""
        return lost_reports(Bounds(self._known, frozenset(), self._epoch), self._min_age, self._watch)

    def lost_pins(self) -> Iterator[Leftover]:
        """Pins and tags of what is no more, and such as came too late for it and whose maker was killed before it saw that."""
        kept = [(names.pin_path(attempt), attempt, lease) for attempt, lease in pins(self._store).items()]
        kept += [
            (names.tag_path(name), lease.attempt, lease) for name, lease in tags(self._store).items() if lease.attempt
        ]
        for path, attempt, lease in kept:
            if attempt not in self._known or (attempt in self._retiring and not lease.holds):
                seen = [ObjectInfo(path, 0, lease.since)]
                yield leftover(self._store, path, seen, self._watch.missing(self._store, path, seen, self._min_age))

    def _dead(self, folder: str, epoch: int) -> Iterator[Garbage]:
        bounds = Bounds(self._known, frozenset(), epoch)
        left = dead(folder, bounds, self._min_age, self._watch)
        if left is not None:
            yield Garbage(ATTEMPT, left)
