"""A chain: sealed objects in a folder, numbered without gaps, each created once. The newest one holds all there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from distckpt.errors import (
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    UnsupportedFormatError,
)
from distckpt.format import names
from distckpt.format.json.sealed import Sealed, unseal
from distckpt.storage import MOST_NAMES, Store, at_most, join, twice

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Sealed)


@dataclass(frozen=True, slots=True)
class Newest(Generic[T]):
    """The highest number in a chain (0: none), the newest entry that can be read, and those newer that cannot."""

    seq: int
    entry: T | None
    damaged: tuple[DamagedError, ...] = ()


@dataclass(frozen=True, slots=True)
class Appended(Generic[T]):
    """What became of an append.

    ``outcome``: "appended", "taken" (``found`` is the other entry, None if unreadable), "unknown" (``reason``), or
    "refused" (``reason``): nothing was written, since no reader would take it, and nothing ever will be.
    ``newest`` is the highest number that a listing made after it shows; 0 when unknown.
    """

    outcome: Literal["appended", "taken", "unknown", "refused"]
    newest: int = 0
    found: T | None = None
    reason: str = ""


class Chain(Generic[T]):
    """The chain of ``kind`` in ``folder``. ``identify`` tells of an entry its number, and what is unique to it for ever.

    Nothing here needs a process of ours to run. Safe to use from several threads.
    """

    def __init__(self, store: Store, folder: str, kind: type[T], identify: Callable[[T], tuple[int, str]]) -> None:
        self.store = store
        self.folder = folder
        self._kind = kind
        self._identify = identify

    def path(self, seq: int) -> str:
        """Where the entry of that number is."""
        return names.link_path(self.folder, seq)

    def numbers(self) -> list[int]:
        """Every number in the chain, ascending.

        A chain has no gaps, and there is nothing else in its folder. A listing that says otherwise is made once more, and
        then believed: no checksum covers it, and a number that is not there would tell a writer that it has been replaced.
        """
        numbers, others = self._listed_numbers()
        if others or numbers[-1:] != [numbers[0] + len(numbers) - 1 for _ in numbers[:1]]:
            numbers, _ = self._listed_numbers()
        return numbers

    def _listed_numbers(self) -> tuple[list[int], int]:
        """Those of the entries, ascending, and how many other objects there are."""
        listed = at_most(MOST_NAMES, self.store.list(self.folder), f"{self.store.url}/{self.folder}")
        found = [names.link_seq(self.folder, info.path) for info in listed]
        numbers = sorted(seq for seq in found if seq is not None)
        return numbers, len(found) - len(numbers)

    def read(self, seq: int) -> T:
        """The entry with that number. DamagedError if it is not what was written; ObjectNotFoundError if it is gone."""
        return twice(lambda: self._read_once(seq))

    def _read_once(self, seq: int) -> T:
        path, most = self.path(seq), self._kind.MAX_BYTES
        entry = unseal(self.store.read(path, most), self._kind, path, most)
        said = self._identify(entry)[0]
        if said != seq:
            raise DamagedError(path, f"the entry says that it is number {said}")
        return entry

    def newest(self, known: Newest[T] | None = None) -> Newest[T]:
        """The end of the chain as it stands. Damaged entries are passed over, remembered and logged, never mended.

        It is ``known``, which was found before, if nothing has come since: that costs one listing. Raises
        UnsupportedFormatError if a newer release wrote one of them, DamagedError if none can be read.
        """
        for _ in range(8):
            numbers = self.numbers()
            if known is not None and known.seq == max(numbers, default=0):
                return known
            found = self._newest_readable(numbers)
            if found is not None:
                return found
        raise StorageError(self.folder, "the log was pruned faster than it could be read, several times over")

    def _newest_readable(self, numbers: list[int]) -> Newest[T] | None:
        damaged: list[DamagedError] = []
        for seq in reversed(numbers):
            try:
                return Newest(numbers[-1], self.read(seq), tuple(damaged))
            except UnsupportedFormatError:
                raise  # a newer release wrote it: to go on from an older entry would undo what it says
            except DamagedError as error:
                # Told anew, for an error that is kept keeps all that its traceback leads to: the 64 MiB of the entry.
                damaged.append(DamagedError(error.path, error.reason, error.key))
                logger.warning("log entry passed over: %s", damaged[-1])
            except ObjectNotFoundError:
                return None  # pruned since the listing: list again
        if damaged:
            raise self._unreadable(damaged)
        return Newest(0, None)

    def _unreadable(self, damaged: list[DamagedError]) -> DamagedError:
        """What is wrong with all entries that there are, and what to do."""
        folder, first = join(self.store.url, self.folder), damaged[0]
        count = "The only entry" if len(damaged) == 1 else f"None of the {len(damaged)} entries"
        then = "whatever used it begins anew"
        if self.folder == names.LOG:
            then = f"run `distckpt adopt {self.store.url}`, which checks all checkpoints and writes a log for the whole ones"
        advice = f"{count} there can{'not' * (len(damaged) == 1)} be read. Stop the job, move {folder} away, and {then}"
        return DamagedError(join(self.store.url, first.path), f"{first.reason}. {advice}", first.key)

    def append(self, entry: T, seal: Callable[[T], bytes]) -> Appended[T]:
        """Put the entry at its number if absent, then look which number is the highest. Never overwrites.

        ``seal`` makes its bytes. BlockedError if what is at that number, or in the place of the chain's folder, is no object
        of a store; StorageFullError if there is no room, and the entry was not written.
        """
        seq, _ = self._identify(entry)
        try:
            data = seal(entry)
        except ValueError as error:
            return Appended("refused", reason=str(error))
        try:
            self.store.put_if_absent(self.path(seq), data)
        except AlreadyExistsError:
            return self._taken(entry)
        except (BlockedError, StorageFullError):
            raise
        except StorageError as error:
            # The name may have been created before the error (a failed fsync, a full disk): ask again rather than assume.
            return Appended("unknown", reason=str(error))
        return self._listed("appended", seq)

    def _taken(self, entry: T) -> Appended[T]:
        seq, unique = self._identify(entry)
        try:
            found = self.read(seq)
        except DamagedError as error:
            logger.warning("cannot read the entry that took our number: %s", error)
            return self._listed("taken", seq)
        except StorageError as error:
            return Appended("unknown", reason=str(error))
        if self._identify(found)[1] == unique:
            return self._listed("appended", seq)
        return self._listed("taken", seq, found)

    def _listed(self, outcome: Literal["appended", "taken"], seq: int, found: T | None = None) -> Appended[T]:
        try:
            numbers = self.numbers()
        except StorageError as error:
            return Appended("unknown", reason=str(error))
        return Appended(outcome, max(numbers, default=seq), found)

    def prune(self, before: int) -> None:
        """Drop the entries of numbers below ``before``; the newest alone holds all there is."""
        for old in self.numbers():
            if old < before:
                self.store.delete(self.path(old))
