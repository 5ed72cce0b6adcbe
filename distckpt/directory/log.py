"""The log on a store: read its tail, append to it, prune it. Nothing here needs a coordinator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from distckpt.directory.chain import Appended, Chain
from distckpt.directory.pages import Lost, readable, with_pages
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.sealed import Sealed, unseal
from distckpt.storage import Store

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
        return self.having(lambda page: True)

    def newest(self) -> CheckpointRecord | None:
        """The newest checkpoint, or None. Pages are only read if no checkpoint is active."""
        return self.head.active[-1] if self.head.active else self.state.newest()

    def having_numbers(self, *numbers: int) -> State:
        """As ``state``, but of what is in pages only those checkpoints are sure to be there that have one of these."""
        wanted = set(numbers)
        return self.having(lambda page: any(map(page.may_have_number, wanted)))

    def having_attempt(self, attempt: str) -> State:
        """As ``state``, but of what is in pages only this attempt is sure to be there."""
        return self.head if attempt in self.head.known() else self.having(lambda page: page.may_have_attempt(attempt))

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

    def having(self, wanted: Callable[[PageRef], bool]) -> State:
        """As ``state``, but of its pages only those are read that are ``wanted``."""
        tail = self
        while tail.store is not None and tail.head.pages:
            try:
                return with_pages(tail.store, tail.head, wanted)
            except DamagedError:
                newer = read_tail(tail.store)
                if newer.seq <= tail.seq:
                    raise
                tail = newer
        return tail.head


def sequence_numbers(store: Store) -> list[int]:
    """Every number in the log, ascending."""
    return _chain(store).numbers()


def read_entry(store: Store, seq: int) -> Entry:
    """The entry with that number. DamagedError if it is not what was written; ObjectNotFoundError if it is gone."""
    return _chain(store).read(seq)


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
    found = _chain(store).newest()
    return Tail(found.seq, found.entry, found.damaged, store)


def append(store: Store, entry: Entry, sealer: EntrySealer | None = None) -> Appended[Entry]:
    """Put the entry at its number if absent, then look which number is the highest. Never overwrites.

    ``sealer`` is that of the entries before, if there is one: it makes this one cheap.
    BlockedError if what is at that number, or in the place of the log's folder, is no object of a store;
    StorageFullError if there is no room, and the entry was not written.
    """
    return _chain(store).append(entry, (sealer or EntrySealer()).seal)


def prune(store: Store, seq: int) -> None:
    """Drop entries that are more than KEEP_ENTRIES below ``seq``; the newest alone holds the whole state."""
    _chain(store).prune(seq - KEEP_ENTRIES)


def _chain(store: Store) -> Chain[Entry]:
    return Chain(store, names.LOG, Entry, lambda entry: (entry.seq, entry.commit_id))
