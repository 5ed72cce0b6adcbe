"""PendingSave: what a save leaves in the caller's hands, and what the rank that makes it has of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from distckpt.format.json.log import CheckpointRecord
from distckpt.transfer.staging import StagedCopy

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Progress:
    """How far a save has come, as the rank that makes it tells: ``staged`` comes first, ``ended`` always comes.

    ``turn`` belongs to whoever brings it to its end and takes it first: the background, or the call that began it and
    gives it up, whatever interrupts that call. ``collected`` says that the caller has been told how it ended.
    """

    staged: Future[StagedCopy] = field(default_factory=Future)
    ended: Future[CheckpointRecord] = field(default_factory=Future)
    turn: threading.Lock = field(default_factory=threading.Lock)
    collected: bool = False

    def fail(self, error: BaseException) -> None:
        """It has ended, unless it had before."""
        if not self.ended.done():
            self.ended.set_exception(error)


class PendingSave:
    """A save under way. ``str()`` and ``os.fspath()`` give the path that it will have once it is committed."""

    def __init__(self, path: str, number: int) -> None:
        self.path = path
        self.number = number
        self._progress = Progress()

    def result(self, timeout: float | None = None) -> str:
        """The path, once the checkpoint is committed: durable and visible to everyone.

        Raises what went wrong, naming ranks: a SaveError, StorageError, CoordinatorError ...; TimeoutError if it is
        not decided within ``timeout`` seconds, which does not count as having been told of a failure.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.path

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None once the checkpoint is committed. TimeoutError as in ``result``."""
        try:
            error = self._progress.ended.exception(timeout)
        except FutureTimeoutError:
            raise TimeoutError(f"{self.path} is not decided after {timeout:g} s") from None
        self._progress.collected = True
        return error

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._progress.ended.done()

    def wait_staged(self) -> None:
        """Return once the state has been copied: from then on training may change it. On CPU that is at once."""
        if self._progress.staged.done():
            self._progress.staged.result().wait()

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "failed" if self._progress.ended.exception() else "committed"
        return f"PendingSave({self.path!r}, {state})"


def progress_of(pending: PendingSave) -> Progress:
    """The other side of ``pending``, for who makes the save. Asking it does not count as having been told."""
    return pending._progress


class PendingSaves:
    """The saves of one manager, each until somebody has been told how it ended."""

    def __init__(self) -> None:
        self._saves: list[PendingSave] = []

    def __iter__(self) -> Iterator[PendingSave]:
        return iter(tuple(self._saves))

    def add(self, pending: PendingSave) -> None:
        """One more."""
        self._saves.append(pending)

    def settle(self, timeout: float | None = None) -> list[PendingSave]:
        """Return once none is under way, or after so many seconds, with those that are. A failure stays to be told."""
        ends = {progress_of(pending).ended: pending for pending in self}
        late = wait(ends, timeout).not_done
        return [pending for end, pending in ends.items() if end in late]

    def raise_failure(self, among: Sequence[PendingSave]) -> None:
        """Raise the first failure ``among`` these of which nobody has been told; log the others."""
        ended = [pending for pending in among if pending.done() and not progress_of(pending).collected]
        failed = [error for pending in ended if (error := pending.exception()) is not None]
        self._saves = [pending for pending in self._saves if not progress_of(pending).collected]
        for error in failed[1:]:
            logger.error("another save failed too: %s", error)
        if failed:
            raise failed[0]
