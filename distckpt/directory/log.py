"""The log on a store: read its tail, append to it, prune it. Nothing here needs a coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.directory.chain import Appended, Chain
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import Entry, State
from distckpt.format.json.sealed import Sealed, unseal
from distckpt.storage import Store

KEEP_ENTRIES = 64
"""Newest entries that pruning leaves alone: enough to look back at what happened, few enough to list at once."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The highest number in the log (0: none), the newest entry that can be read, and those newer that cannot."""

    seq: int
    entry: Entry | None
    damaged: tuple[DamagedError, ...] = ()

    @property
    def state(self) -> State:
        """The checkpoint state of the newest readable entry; empty in a fresh directory."""
        return self.entry.state if self.entry is not None else State()


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


class _CommitId(Sealed, frozen=True, forbid_unknown_fields=False):
    """What of an entry says who wrote it."""

    commit_id: str


def read_tail(store: Store) -> Tail:
    """The log's tail as it stands. Damaged entries are passed over, remembered and logged, never mended.

    Raises UnsupportedFormatError if a newer release wrote one of them, DamagedError if none can be read.
    """
    found = _chain(store).newest()
    return Tail(found.seq, found.entry, found.damaged)


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
