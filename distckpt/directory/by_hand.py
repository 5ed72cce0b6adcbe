"""Entries that people's commands write to a log where no job runs."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable

from distckpt.directory.contents import attempts, checkpoint_folders, is_there
from distckpt.directory.log import Tail, append, prune
from distckpt.directory.pages import write_page
from distckpt.directory.published import PublishedState
from distckpt.errors import CoordinatorError, DamagedError, StorageError, StoreOutcomeUnknownError
from distckpt.format import names
from distckpt.format.json.log import FORMAT, CheckpointRecord, Entry, Kind, State
from distckpt.format.json.paging import SIZES, next_page, turned
from distckpt.storage import Store, join, parts_of, probe

logger = logging.getLogger(__name__)

RECENT_SECONDS = 600.0
"""A log whose newest entry is younger than this may belong to a job that runs."""

_BY_HAND = "by-hand-"


def is_by_hand(tail: Tail) -> bool:
    """Whether a command wrote the newest entry, which has turned away every job that ran then."""
    return tail.entry is not None and tail.entry.commit_id.startswith(_BY_HAND)


def check_quiet(store: Store, tail: Tail, now: float, doing: str) -> None:
    """CoordinatorError if a job may be running in the directory, which ``doing`` that would stop. ``now``: epoch seconds.

    That goes by the times of two hosts, so it may be wrong by as much as their clocks. It is advice to a person and keeps
    nothing safe: a job that runs all the same is fenced by what is written, loses nothing, and says so.
    """
    if tail.entry is not None and now - tail.entry.time < RECENT_SECONDS and not is_by_hand(tail):
        raise CoordinatorError(
            f"{store.url}: its log was written to less than {RECENT_SECONDS / 60:g} minutes ago, so a job may be "
            f"running, which {doing} would stop. Make sure that none is, and pass --force"
        )


def check_nothing_sealed(store: Store, tail: Tail) -> None:
    """CoordinatorError if the last coordinator has left a whole save that only lacks its entry.

    The next one would commit it; after an entry by hand nobody would.
    """
    if tail.entry is None:
        return
    active = tail.head.active
    last = names.attempt_age(active[-1].attempt) if active else (0, "")
    home = parts_of(store)[0]  # which has the manifests
    for folder in checkpoint_folders(home):
        for attempt in attempts(home, folder):
            is_of_last = names.claim_of(attempt) == names.claim_of(tail.entry.commit_id)
            # What is in a page is older than the last one.
            if not is_of_last or attempt in tail.head.known() or names.attempt_age(attempt) < last:
                continue
            if is_there(store, f"{folder}/{attempt}/{names.MANIFEST}"):
                raise CoordinatorError(
                    f"{store.url}: {folder} was saved whole and only lacks its entry in the log, which the job writes when "
                    f"it starts again. Start it, or run `distckpt adopt {store.url}`, which writes it too"
                )


def in_save_order(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """By the order in which their saves began, which no clock has a say in; by time if they are of several runs.

    In one directory an epoch has one coordinator. So two in one epoch were copied from different directories.
    """
    records = list(records)
    claims = {(names.attempt_epoch(record.attempt), names.claim_of(record.attempt)) for record in records}
    if len({epoch for epoch, _ in claims}) == len(claims):
        return sorted(records, key=lambda record: names.attempt_age(record.attempt))
    return sorted(records, key=lambda record: record.time)


class Hand:
    """Writes one entry after the other, all in an epoch of their own, which the first one claims.

    So a coordinator that still runs is fenced. Every entry has the whole state: nothing is half done if this process is
    killed. ``tail`` is the log as it was read; ``doing``, "adopt" say, stands in errors.
    """

    def __init__(self, store: Store, tail: Tail, doing: str, epochs: Iterable[int] = ()) -> None:
        self._store = store
        self._doing = doing
        self._seq = tail.seq
        self._epoch = max((*epochs, tail.entry.epoch if tail.entry is not None else 0)) + 1
        self._has_claimed = False
        self._state_file = PublishedState(store)

    def write(self, kind: Kind, state: State, now: float) -> Entry:
        """Append the entry that has ``state``; it counts on return. ``now`` is in epoch seconds.

        Raises CoordinatorError if somebody else has written to the log meanwhile, or if no reader would take the entry,
        StoreUnsuitableError or StorageError if the store fails.
        """
        if not self._has_claimed:
            probe(self._store)
        commit_id = f"{_BY_HAND}{uuid.uuid4().hex}"
        state = self._turned(state)
        entry = Entry(FORMAT, self._seq + 1, self._epoch, kind if self._has_claimed else "claim", now, commit_id, state)
        self._append(entry)
        self._seq, self._has_claimed = entry.seq, True
        self._publish(entry)
        return entry

    def _turned(self, state: State) -> State:
        """The state with its older records in pages, if there are many of them. An entry has room without, if need be."""
        while (found := next_page(state, SIZES, active=True)) is not None:
            page = f"e{self._epoch}-{uuid.uuid4().hex}"
            try:
                ref = write_page(self._store, page, *found)
            except StorageError as error:
                logger.warning("older checkpoints stay in the entry itself: %s", error)
                break
            state = turned(state, ref, found[1])
        return state

    def _append(self, entry: Entry) -> None:
        url, doing = self._store.url, self._doing
        result = append(self._store, entry)
        if result.outcome == "refused":
            raise CoordinatorError(f"{url}: there was nothing to {doing}: {result.reason}")
        if result.outcome == "unknown" or 0 < result.newest < entry.seq:
            reason = result.reason or "a listing does not show it"
            path = join(url, names.entry_path(entry.seq))
            raise StoreOutcomeUnknownError(
                path, f"may or may not have been written ({reason}). Run it again, which looks"
            )
        if result.outcome == "taken" or result.newest > entry.seq:
            raise CoordinatorError(
                f"{url}: somebody else has written to the log meanwhile, so no entry of this {doing} counts any more. "
                "Let no job run here and run it again"
            )

    def _publish(self, entry: Entry) -> None:
        """Refresh the state file, which is derived, and prune the log: the next manager does it again."""
        try:
            self._state_file.publish(entry.state)
            prune(self._store, entry.seq)
        except (StorageError, DamagedError) as error:
            logger.warning("%s/%s may not have been refreshed: %s", self._store.url, names.STATE_FILE, error)
