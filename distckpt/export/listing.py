"""Which exports there are, in the order of their saves, and waiting for new ones. Needs no Ray and no torch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.directory.exports import read_export
from distckpt.directory.log import read_tail, sequence_numbers
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.iterators import POLL_SECONDS, follow, wait_for
from distckpt.storage import PathLike, Store, join, open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class _Position:
    """Where an export is in the order of numbers; of two attempts at one number the younger comes later."""

    number: int
    age: tuple[int, str]


def list_exports(
    directory: PathLike, checkpoint_name: str = "ckpt", *, storage_options: Mapping[str, Any] | None = None
) -> list[str]:
    """Paths of all exports of committed checkpoints, preserved ones too, in the order of their saves, oldest first.

    After a rollback that is not the order of their numbers. An export whose description is damaged is left out, with an
    error in the log. StorageError if the store cannot be read, DamagedError if no log entry can; a directory that does
    not exist has no exports.
    """
    return Exports(open_store(directory, storage_options), checkpoint_name).paths()


def latest_export(
    directory: PathLike, checkpoint_name: str = "ckpt", *, storage_options: Mapping[str, Any] | None = None
) -> str | None:
    """The path of the export of the checkpoint that was saved last among those that have one, or None.

    That may have a lower number than others, after a rollback. Raises what ``list_exports`` raises.
    """
    return Exports(open_store(directory, storage_options), checkpoint_name).latest()


def wait_for_new_export(
    directory: PathLike,
    last_export: PathLike | None = None,
    seconds_to_sleep: float = POLL_SECONDS,
    timeout: float | None = None,
    *,
    checkpoint_name: str = "ckpt",
    storage_options: Mapping[str, Any] | None = None,
) -> str | None:
    """The path of the export that comes next after ``last_export`` in the order of numbers, as soon as there is one.

    Looks at least once, then every ``seconds_to_sleep`` seconds and once more when ``timeout`` seconds are over; None
    if nothing came by then. With no last one it is the export with the lowest number; 0 is a number. The same number
    exported again, after its checkpoint was saved again, is new.

    Raises ValueError if ``last_export`` is not the path of an export, and what ``list_exports`` raises.
    """
    found = Exports(open_store(directory, storage_options), checkpoint_name)
    return found.wait(last_export, seconds_to_sleep, timeout)


def exports_iterator(
    directory: PathLike,
    min_interval_secs: float = 0,
    timeout: float | None = None,
    timeout_fn: Callable[[], object] | None = None,
    *,
    checkpoint_name: str = "ckpt",
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yields the paths of exports in the order of their numbers, then that of each new one as it comes.

    All exports that are there when they are asked for are visited, not only the newest; arguments and end are those of
    ``checkpoints_iterator``. Raises what ``list_exports`` raises.
    """
    found = Exports(open_store(directory, storage_options), checkpoint_name)
    return found.iterator(min_interval_secs, timeout, timeout_fn)


def export_number(path: PathLike, checkpoint_name: str | None = None) -> int | None:
    """The number of the checkpoint that the export at ``path`` was made from; None if it is no such path.

    With ``checkpoint_name`` the path of another name's export is none either. A slash at the end does no harm.
    """
    position = _position(path, checkpoint_name)
    return None if position is None else position.number


class Exports:
    """The exports of one name in a directory. What has been found once is remembered, since it never changes."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._seq = 0
        self._records: list[CheckpointRecord] = []
        self._known: dict[str, str | None] = {}

    def paths(self) -> list[str]:
        """All of them, in the order of saves, oldest first."""
        return [path for record in self._look() if (path := self._path(record)) is not None]

    def latest(self) -> str | None:
        """The one that was saved last."""
        return next((path for record in reversed(self._look()) if (path := self._path(record)) is not None), None)

    def after(self, last: str | None) -> str | None:
        """The one that follows the export at ``last``, or the first one."""
        position = None if last is None else _position(last, self._name)
        by_number = sorted(self._look(), key=_position_of)
        younger = (record for record in by_number if position is None or _position_of(record) > position)
        return next((path for record in younger if (path := self._path(record)) is not None), None)

    def wait(self, last: PathLike | None, seconds_to_sleep: float, timeout: float | None) -> str | None:
        """See wait_for_new_export."""
        if last is not None and _position(last, self._name) is None:
            raise ValueError(f"not the path of an export of {self._name!r} checkpoints: {os.fspath(last)!r}")
        given = None if last is None else os.fspath(last)
        return wait_for(functools.partial(self.after, given), seconds_to_sleep, timeout)

    def iterator(
        self, min_interval_secs: float, timeout: float | None, timeout_fn: Callable[[], object] | None
    ) -> Iterator[str]:
        """See exports_iterator."""
        return follow(self.after, min_interval_secs, timeout, timeout_fn)

    def _look(self) -> list[CheckpointRecord]:
        """The committed checkpoints of this name, one a number, in the order of saves."""
        seq = max(sequence_numbers(self._store), default=0)
        if seq != self._seq:
            newest: dict[int, CheckpointRecord] = {}
            for record in read_tail(self._store).state.newest_first():
                if record.name == self._name:
                    newest.setdefault(record.number, record)
            self._records, self._seq = list(reversed(newest.values())), seq
        return self._records

    def _path(self, record: CheckpointRecord) -> str | None:
        if record.attempt not in self._known:
            folder = names.attempt_folder(record.name, record.number, record.attempt)
            try:
                export = read_export(self._store, folder)
            except DamagedError as error:
                logger.error("an export is left out: %s", error)  # noqa: TRY400 - the sentence says it all
                self._known[record.attempt] = None
            else:
                if export is None:
                    return None
                self._known[record.attempt] = join(self._store.url, folder, export.folder)
        return self._known[record.attempt]


def _position_of(record: CheckpointRecord) -> _Position:
    return _Position(record.number, names.attempt_age(record.attempt))


def _position(path: PathLike, name: str | None) -> _Position | None:
    checkpoint, attempt, export = ["", "", *os.fspath(path).rstrip("/").split("/")][-3:]
    parsed = names.parse_checkpoint(checkpoint)
    if parsed is None or not names.is_attempt(attempt) or not names.is_export(export) or name not in (None, parsed[0]):
        return None
    return _Position(parsed[1], names.attempt_age(attempt))
