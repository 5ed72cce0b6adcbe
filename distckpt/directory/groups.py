"""Groups of readers on a store: a chain for each, to which any of its workers appends. No process of ours is needed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence

from distckpt.directory import sharing
from distckpt.directory.chain import Chain, Newest
from distckpt.directory.log import read_tail
from distckpt.directory.pages import read_page
from distckpt.directory.sharing import Settings, waiting
from distckpt.errors import (
    DamagedError,
    GroupMismatchError,
    GroupNotFoundError,
    ObjectNotFoundError,
    StorageError,
    StoreOutcomeUnknownError,
)
from distckpt.format import names
from distckpt.format.json.group import FORMAT, GroupEntry, GroupState, Kind
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.paging import opened
from distckpt.format.json.sealed import seal
from distckpt.storage import Store, at_most, join

__all__ = ["Group", "group_names", "read_groups", "skip", "waiting", "wanted_by"]

logger = logging.getLogger(__name__)

MOST_GROUPS = 1024

KEEP_ENTRIES = 64
PRUNE_EVERY = 16

PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Seconds before each try to find out what became of an entry."""


def group_names(store: Store) -> list[str]:
    """The groups of a directory. What else lies among them is none."""
    found = at_most(MOST_GROUPS, store.folders(names.GROUPS), f"{store.url}/{names.GROUPS}")
    return sorted(name for name in found if names.is_name(name))


def read_groups(store: Store, known: dict[str, Newest[GroupEntry]] | None = None) -> Mapping[str, GroupState]:
    """How every group of a directory stands. Costs a listing, and of each group a listing and its newest entry.

    ``known`` is for who looks again and again, and is kept up here: an entry that has been read before is not read again.
    StorageError if they cannot be read, DamagedError if of one of them no entry can be read: to delete ``_groups/<group>``
    makes an end of that group, and it begins anew.
    """
    before = known if known is not None else {}
    now = {name: _chain(store, name).newest(_undamaged(before.get(name))) for name in group_names(store)}
    if known is not None:
        known.clear()
        known.update(now)
    return {name: found.entry.state for name, found in now.items() if found.entry is not None}


def wanted_by(store: Store, log: State, groups: Collection[GroupState]) -> State:
    """The state of the log with everything at hand that these groups may still want. Raises as ``pages.whole``."""
    return opened(log, {page.id: read_page(store, page) for page in log.pages if _may_want(page, log, groups)})


def _may_want(page: PageRef, log: State, groups: Collection[GroupState]) -> bool:
    return any(sharing.may_want(group, log, page) for group in groups)


def skip(store: Store, group: str, records: Sequence[CheckpointRecord]) -> None:
    """Say in the group's chain that it does not get these, because it lags: before they are retired.

    Those that its workers have they keep. Returns once it counts; StorageError if that is not sure.
    """
    tail = read_tail(store)

    def apply(state: GroupState) -> GroupState:
        # Where a group begins in a log hangs on all of it; one that has begun there needs nothing of it.
        log = tail.head if state.origin == tail.head.origin else tail.state
        return sharing.skipped(sharing.moved(state, log), records)

    Group(store, group, "retention").change("skip", apply)


class Group:
    """One group, as one of its workers sees it: reads its newest entry, appends to it. ``worker`` is for people.

    Several may append at once: who finds the number taken applies the change to what is there now. ValueError if ``name``
    is no name. For one thread at a time.
    """

    def __init__(self, store: Store, name: str, worker: str) -> None:
        if not names.is_name(name):
            raise ValueError(
                f"{name!r} is no name for a group: up to 128 letters, digits and '._-', the first of them no '._-'"
            )
        self.name = name
        self.worker = sharing.text(worker)
        self._store = store
        self._chain = _chain(store, name)
        self._newest: Newest[GroupEntry] | None = None

    def read(self) -> GroupState | None:
        """How it stands; None if there is no such group. Costs a listing, and more only if it has changed.

        DamagedError if no entry can be read.
        """
        self._newest = self._look()
        return self._newest.entry.state if self._newest.entry is not None else None

    def newest(self) -> GroupEntry | None:
        """The newest entry of its chain; None if there is no such group. Raises what ``read`` raises."""
        self.read()
        return self._newest.entry if self._newest is not None else None

    def join(self, settings: Settings, log: State) -> GroupState:
        """How it stands; it is made if there is no such group. GroupMismatchError if its settings are other ones."""
        state = self.read()
        if state is None:
            made = sharing.made(settings, log)
            state = self._change("make", lambda found: made if found is None else found) or made
        differing = sharing.disagreements(settings, state)
        if differing:
            raise GroupMismatchError(self._store.url, self.name, differing)
        return state

    def change(self, kind: Kind, apply: Callable[[GroupState], GroupState | None]) -> GroupState | None:
        """Apply a change to how it stands now, until it counts; None, and nothing is written, if ``apply`` gives None.

        ``apply`` may be called several times, each time with what is there. An entry counts if a listing made after it
        shows nothing higher, or if what is next was made from it. StoreOutcomeUnknownError if the store does not say,
        StorageFullError if there is no room, GroupNotFoundError if there is no such group.
        """

        def present(state: GroupState | None) -> GroupState | None:
            if state is None:
                raise GroupNotFoundError(self._store.url, self.name)
            return apply(state)

        return self._change(kind, present)

    def _change(self, kind: Kind, apply: Callable[[GroupState | None], GroupState | None]) -> GroupState | None:
        doubt = ""
        while True:
            self._newest = found = self._whole()
            before = found.entry.state if found.entry is not None else None
            state = apply(before)
            if state is None and doubt:  # perhaps just because it counts
                raise StoreOutcomeUnknownError(join(self._store.url, names.group_folder(self.name)), doubt)
            if state is None or state == before:
                return state
            previous = found.entry.commit_id if found.entry is not None else ""
            entry = GroupEntry(FORMAT, found.seq + 1, kind, time.time(), self.worker, uuid.uuid4().hex, previous, state)
            try:
                counts = self._append(entry)
            except _CannotTell as error:
                counts, doubt = False, str(error)
            if counts:
                self._prune(entry.seq)
                return state

    def _look(self) -> Newest[GroupEntry]:
        return self._chain.newest(_undamaged(self._newest))

    def _whole(self) -> Newest[GroupEntry]:
        """The end of the chain to append to. What goes on from an entry before the newest undoes that: so it is read again

        and again before it counts as damaged.
        """
        for pause in PAUSES:
            time.sleep(pause)
            found = self._look()
            if not found.damaged:
                break
        return found

    def _append(self, entry: GroupEntry) -> bool:
        """Whether it counts; if not, it never will.

        What is in its place may be its own, or another's who came first; or the chain had been pruned there, and somebody has
        filled the place who comes too late. As long as nothing is next, the chain has not been pruned beyond it.
        """
        reason, unread = "", False
        for pause in PAUSES:
            time.sleep(pause)
            result = self._chain.append(entry, seal)
            if result.outcome == "refused":
                raise ValueError(result.reason)
            unread = result.outcome == "taken" and result.found is None  # our own, perhaps: it is read again
            if result.outcome != "unknown" and result.newest > entry.seq:
                return self._is_followed(entry)
            if result.outcome != "unknown" and result.newest == entry.seq and not unread:
                return result.outcome == "appended"
            reason = result.reason or ("what is there cannot be read" if unread else "a listing does not show it")
        if unread:
            raise _CannotTell(f"may or may not have been written ({reason})")
        where = join(self._store.url, self._chain.path(entry.seq))
        raise StoreOutcomeUnknownError(where, f"may or may not have been written ({reason})")

    def _is_followed(self, entry: GroupEntry) -> bool:
        """Whether the next one was made from it. If not, another one counts that is, or was, in its place.

        Once the next one has been pruned, too, nobody can tell: somebody may have gone on from it, and then it counts.
        """
        try:
            return self._chain.read(entry.seq + 1).previous == entry.commit_id
        except (ObjectNotFoundError, DamagedError) as error:
            raise _CannotTell(f"may or may not count, for what came next is gone: {error}") from error

    def _prune(self, seq: int) -> None:
        if seq % PRUNE_EVERY:
            return
        try:
            self._chain.prune(seq - KEEP_ENTRIES)
        except (StorageError, DamagedError) as error:
            logger.warning("old entries of the group %s were left: %s", self.name, error)


class _CannotTell(Exception):
    """Whether an entry counts."""


def _undamaged(known: Newest[GroupEntry] | None) -> Newest[GroupEntry] | None:
    """What was damaged may be read the next time."""
    return known if known is not None and not known.damaged else None


def _chain(store: Store, name: str) -> Chain[GroupEntry]:
    return Chain(store, names.group_folder(name), GroupEntry, lambda entry: (entry.seq, entry.commit_id))
