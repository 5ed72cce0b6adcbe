"""The log on a store: read its tail, append to it, prune it. Nothing here needs a coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from distckpt.directory.pages import Lost, readable, whole, with_attempt, with_later, with_numbers
from distckpt.errors import (
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
    UnsupportedFormatError,
)
from distckpt.format import names
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.sealed import Sealed, unseal
from distckpt.storage import MOST_NAMES, Store, at_most, twice

logger = logging.getLogger(__name__)

KEEP_ENTRIES = 64
"""Newest entries that pruning leaves alone: enough to look back at what happened, few enough to list at once."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The highest number in the log (0: none), the newest entry that can be read, and those newer that cannot.

    ``store`` has its pages.
    """

    seq: int
    entry: Entry | None
    damaged: tuple[DamagedError, ...] = ()
    store: Store | None = field(default=None, compare=False, repr=False)

    @property
    def head(self) -> State:
        """What the newest readable entry has itself: the newest checkpoints, and older ones that are in no page."""
        return self.entry.state if self.entry is not None else State()

    @property
    def state(self) -> State:
        """The checkpoint state of the newest readable entry; empty in a fresh directory. Every page is read.

        DamagedError, which names it, for a page that cannot be. If one was let go since the entry was read, it is the
        state of a newer entry.
        """
        return self._with(whole)

    def newest(self) -> CheckpointRecord | None:
        """The newest checkpoint, or None. Pages are only read if no checkpoint is active."""
        return self.head.active[-1] if self.head.active else self.state.newest()

    def having_numbers(self, *numbers: int) -> State:
        """As ``state``, but of what is in pages only those checkpoints are sure to be there that have one of these."""
        return self._with(lambda store, state: with_numbers(store, state, numbers))

    def having_attempt(self, attempt: str) -> State:
        """As ``state``, but of what is in pages only this attempt is sure to be there."""
        return self._with(lambda store, state: with_attempt(store, state, attempt))

    def having_later(self, order: int) -> State:
        """As ``state``, but of what is in pages only what came after the first ``order`` commits is sure to be there."""
        return self._with(lambda store, state: with_later(store, state, order))

    def readable(self) -> tuple[State, tuple[Lost, ...]]:
        """As ``state``, but without what is in pages that cannot be read, and those pages."""
        tail = self
        while tail.store is not None:
            found, lost = readable(tail.store, tail.head)
            newer = read_tail(tail.store) if lost else tail
            if newer.seq <= tail.seq:
                return found, lost
            tail = newer
        return tail.head, ()

    def _with(self, opened: Callable[[Store, State], State]) -> State:
        tail = self
        while tail.store is not None and tail.head.pages:
            try:
                return opened(tail.store, tail.head)
            except DamagedError:
                newer = read_tail(tail.store)
                if newer.seq <= tail.seq:
                    raise
                tail = newer
        return tail.head


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of an append.

    ``outcome``: "appended", "taken" (``found`` is the other entry, None if unreadable), "unknown" (``reason``), or
    "refused" (``reason``): nothing was written, since no reader would take it, and nothing ever will be.
    ``newest`` is the highest number that a listing made after it shows; 0 when unknown.
    """

    outcome: str
    newest: int = 0
    found: Entry | None = None
    reason: str = ""


def sequence_numbers(store: Store) -> list[int]:
    """Every number in the log, ascending.

    A log has no gaps, and there is nothing else in its folder. A listing that says otherwise is made once more, and then
    believed: no checksum covers it, and a number that is not there would tell a coordinator that it has been replaced.
    """
    numbers, others = _listed_numbers(store)
    if others or numbers[-1:] != [numbers[0] + len(numbers) - 1 for _ in numbers[:1]]:
        numbers, _ = _listed_numbers(store)
    return numbers


def _listed_numbers(store: Store) -> tuple[list[int], int]:
    """Those of the entries, ascending, and how many other objects there are."""
    listed = at_most(MOST_NAMES, store.list(names.LOG), f"{store.url}/{names.LOG}")
    found = [names.entry_seq(info.path) for info in listed]
    numbers = sorted(seq for seq in found if seq is not None)
    return numbers, len(found) - len(numbers)


def read_entry(store: Store, seq: int) -> Entry:
    """The entry with that number. DamagedError if it is not what was written; ObjectNotFoundError if it is gone."""
    return twice(lambda: _read_once(store, seq))


def _read_once(store: Store, seq: int) -> Entry:
    path = names.entry_path(seq)
    entry = unseal(store.read(path, Entry.MAX_BYTES), Entry, path, Entry.MAX_BYTES)
    if entry.seq != seq:
        raise DamagedError(path, f"the entry says that it is number {entry.seq}")
    return entry


def read_commit_id(store: Store, seq: int) -> str:
    """The commit id of the entry with that number, without the state. Raises what ``read_entry`` raises."""
    path = names.entry_path(seq)
    return unseal(store.read(path, Entry.MAX_BYTES), _CommitId, path, Entry.MAX_BYTES).commit_id


def referred_pages(store: Store) -> frozenset[str]:
    """The ids of all pages that an entry of the log refers to. DamagedError if one of them cannot be read."""
    pages: set[str] = set()
    for seq in sequence_numbers(store):
        path = names.entry_path(seq)
        try:
            entry = unseal(store.read(path, Entry.MAX_BYTES), _Pages, path, Entry.MAX_BYTES)
        except ObjectNotFoundError:
            continue  # pruned meanwhile
        pages.update(page.id for page in entry.state.pages)
    return frozenset(pages)


class _PageId(msgspec.Struct, frozen=True):
    id: str


class _PageIds(msgspec.Struct, frozen=True):
    pages: tuple[_PageId, ...] = ()


class _Pages(Sealed, frozen=True, forbid_unknown_fields=False):
    """What of an entry says which pages it needs."""

    state: _PageIds


class _CommitId(Sealed, frozen=True, forbid_unknown_fields=False):
    """What of an entry says who wrote it."""

    commit_id: str


def read_tail(store: Store) -> Tail:
    """The log's tail as it stands. Damaged entries are passed over, remembered and logged, never mended.

    Raises UnsupportedFormatError if a newer release wrote one of them, DamagedError if none can be read.
    """
    for _ in range(8):
        numbers = sequence_numbers(store)
        tail = _newest_readable(store, numbers)
        if tail is not None:
            return tail
    raise StorageError(names.LOG, "the log was pruned faster than it could be read, several times over")


def _newest_readable(store: Store, numbers: list[int]) -> Tail | None:
    damaged: list[DamagedError] = []
    for seq in reversed(numbers):
        try:
            return Tail(numbers[-1], read_entry(store, seq), tuple(damaged), store)
        except UnsupportedFormatError:
            raise  # a newer release wrote it: to go on from an older entry would undo what it says
        except DamagedError as error:
            # Told anew, for an error that is kept keeps all that its traceback leads to: the 64 MiB of the entry.
            damaged.append(DamagedError(error.path, error.reason, error.key))
            logger.warning("log entry passed over: %s", damaged[-1])
        except ObjectNotFoundError:
            return None  # pruned since the listing: list again
    if damaged:
        raise damaged[0]
    return Tail(0, None, (), store)


def append(store: Store, entry: Entry, sealer: EntrySealer | None = None) -> AppendResult:
    """Put the entry at its number if absent, then look which number is the highest. Never overwrites.

    ``sealer`` is that of the entries before, if there is one: it makes this one cheap.
    BlockedError if what is at that number, or in the place of the log's folder, is no object of a store;
    StorageFullError if there is no room, and the entry was not written.
    """
    try:
        data = (sealer or EntrySealer()).seal(entry)
    except ValueError as error:
        return AppendResult("refused", reason=str(error))
    try:
        store.put_if_absent(names.entry_path(entry.seq), data)
    except AlreadyExistsError:
        return _taken(store, entry)
    except (BlockedError, StorageFullError):
        raise
    except StoreOutcomeUnknownError as error:
        return AppendResult("unknown", reason=str(error))
    except StorageError as error:
        # The name may have been created before the error (a failed fsync, a full disk): ask again rather than assume.
        return AppendResult("unknown", reason=str(error))
    return _listed(store, "appended", entry.seq)


def _taken(store: Store, entry: Entry) -> AppendResult:
    try:
        found = read_entry(store, entry.seq)
    except DamagedError as error:
        logger.warning("cannot read the entry that took our number: %s", error)
        return _listed(store, "taken", entry.seq)
    except StorageError as error:
        return AppendResult("unknown", reason=str(error))
    if found.commit_id == entry.commit_id:
        return _listed(store, "appended", entry.seq)
    return _listed(store, "taken", entry.seq, found)


def _listed(store: Store, outcome: str, seq: int, found: Entry | None = None) -> AppendResult:
    try:
        numbers = sequence_numbers(store)
    except StorageError as error:
        return AppendResult("unknown", reason=str(error))
    return AppendResult(outcome, max(numbers, default=seq), found)


def prune(store: Store, seq: int) -> None:
    """Drop entries that are more than KEEP_ENTRIES below ``seq``; the newest alone holds the whole state."""
    for old in sequence_numbers(store):
        if old < seq - KEEP_ENTRIES:
            store.delete(names.entry_path(old))
