"""Log entries one after the other: what an entry has in common with the one before costs next to nothing again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crc32c
import msgspec

from distckpt.format.json.following import FollowingText
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.page import PageRef
from distckpt.format.json.sealed import SEAL_BYTES, seal, seal_of

_EMPTY: dict[str, Any] = {"active": (), "preserved": (), "retiring": (), "pages": ()}
_EMPTY_TEXT = b'"active":[],"preserved":[],"retiring":[]'  # no string in JSON looks like that: quotes in it are escaped
_NO_PAGES = b',"pages":[]'


class EntrySealer:
    """Seals the entries of one log, as ``sealed.seal`` does; each record is encoded and checked once.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._forget()

    def seal(self, entry: Entry) -> bytes:
        """The entry as sealed JSON that every reader will take and find equal. Without pages it does not speak of them.

        ValueError if there is none, and for a commit that would leave no room for what may have to follow it.
        """
        try:
            return self._seal(entry)
        except BaseException:
            self._forget()  # it may have followed half of the entry
            raise

    def _forget(self) -> None:
        self._active, self._preserved, self._retiring = _Records(), _Records(), _Records()
        self._pages = FollowingText(_encode_page)

    def _seal(self, entry: Entry) -> bytes:
        state = entry.state
        self._follow(state)
        # The records are sound, by themselves and together; so this is about everything else.
        rest = seal(msgspec.structs.replace(entry, state=msgspec.structs.replace(state, **_EMPTY)))
        head, _, rest_of_state = rest[:-SEAL_BYTES].partition(_EMPTY_TEXT)
        middle, _, tail = rest_of_state.partition(_NO_PAGES)
        active, preserved, retiring = self._active.json, self._preserved.json, self._retiring.json
        lists = (b'"active":[', active, b'],"preserved":[', preserved, b'],"retiring":[', retiring, b"]")
        pages = (b',"pages":[', memoryview(self._pages.text)[:-1], b"]") if state.pages else ()
        parts = (head, *lists, middle, *pages, tail)
        crc = 0
        for part in parts:
            crc = crc32c.crc32c(part, crc)
        data = b"".join((*parts, seal_of(crc)))
        _check_room(entry, len(data), len(retiring))
        return data

    def _follow(self, state: State) -> None:
        alive = (*self._active.follow(state.active), *self._preserved.follow(state.preserved))
        retiring = self._retiring.follow(state.retiring)
        twice = len(self._active.folders) < len(state.active)
        twice |= any(records.twice for records in (self._active, self._preserved, self._retiring))
        twice |= any(record.attempt in self._retiring.attempts for record in alive)
        twice |= any(
            record.attempt in records.attempts for record in retiring for records in (self._active, self._preserved)
        )
        self._pages.follow(state.pages)
        twice |= len({page.id for page in state.pages}) < len(state.pages)
        if twice:
            raise ValueError(f"this Entry cannot be stored: {next(state.doubles())}")


class _Records:
    """One list of a state: its JSON without brackets, and what tells whether something is in it twice."""

    def __init__(self) -> None:
        self._text = FollowingText(_encode)
        self.attempts: set[str] = set()
        self.folders: set[tuple[str, int]] = set()

    @property
    def json(self) -> memoryview:
        return memoryview(self._text.text)[:-1]

    @property
    def twice(self) -> bool:
        return len(self.attempts) < len(self._text.records)

    def follow(self, records: tuple[CheckpointRecord, ...]) -> Sequence[CheckpointRecord]:
        """It is this list now; the records that have come."""
        gone, come = self._text.follow(records)
        self.attempts.difference_update(record.attempt for record in gone)
        self.attempts.update(record.attempt for record in come)
        self.folders.difference_update((record.name, record.number) for record in gone)
        self.folders.update((record.name, record.number) for record in come)
        return come


def _encode(record: CheckpointRecord) -> bytes:
    for problem in record.problems():
        raise ValueError(f"this CheckpointRecord cannot be stored: {problem}")
    data = msgspec.json.encode(record)
    if msgspec.json.decode(data, type=CheckpointRecord) != record:
        raise ValueError("this CheckpointRecord would read back as another one")
    return data + b","


def _encode_page(page: PageRef) -> bytes:
    for problem in page.problems():
        raise ValueError(f"this PageRef cannot be stored: {problem}")
    return msgspec.json.encode(page) + b","


def _check_room(entry: Entry, size: int, retiring: int) -> None:
    """Whether an entry of so many bytes may be written, of which so many are records of what is being deleted.

    A commit leaves an eighth free, where those do not count: so whoever keeps fewer from now on can always commit. And it
    leaves a 64th in any case: so the claim and the run that may come next fit, and a retirement, which makes it smaller.
    """
    most = entry.MAX_BYTES
    fits = size <= most
    if entry.kind == "commit":
        fits = size <= most - most // 64 and size - retiring <= most - most // 8
    if not fits:
        count = len(entry.state.known())
        raise ValueError(
            f"a log entry that lists {count} checkpoints would be {size} bytes long, too long to be read. Keep fewer: "
            "give the manager a (lower) max_to_keep and a larger or no keep_checkpoint_every_n_hours, or save to a new "
            "directory"
        )
