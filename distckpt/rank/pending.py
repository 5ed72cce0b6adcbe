"""PendingSave: what a save leaves in the caller's hands, and what the rank that makes it has of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from distckpt.coordinator.messages import Landing
from distckpt.format.json.log import CheckpointRecord
from distckpt.rank.tolerance import Tolerance
from distckpt.transfer.staging import StagedCopy

logger = logging.getLogger(__name__)

MaybeNone: TypeAlias = Any
"""None, which a call may give but does not where nobody has asked for it: type checkers do not have it looked at."""


@dataclass(slots=True, eq=False)
class Progress:
    """How far a save has come, as the rank that makes it tells: ``staged`` comes first, ``ended`` always comes.

    ``turn`` belongs to whoever brings it to its end and takes it first: the background, or the call that began it and
    gives it up, whatever interrupts that call. ``began`` is when ``save`` was called, by a clock of this process; for
    ``stall`` seconds training stood still, and ``written`` seconds after its begin this rank's shards were on storage.
    For ``queued`` of them it waited for a buffer, and ``copied`` is what copying took; ``nbytes`` is what this rank wrote.
    ``last`` is who landed last, once it is committed and if this rank was told.
    ``waiting`` is told for how many seconds somebody has waited for the end.
    ``collected`` says that the caller has been told how it ended. A failure is ``excused`` if ``tolerance``, where there
    is one, says that training may go on all the same.
    """

    path: str = ""
    tolerance: Tolerance | None = None
    staged: Future[StagedCopy] = field(default_factory=Future)
    ended: Future[CheckpointRecord] = field(default_factory=Future)
    turn: threading.Lock = field(default_factory=threading.Lock)
    collected: bool = False
    began: float = field(default_factory=time.monotonic)
    stall: float = 0.0
    written: float | None = None
    over: float | None = None
    excused: bool = False
    queued: float = 0.0
    copied: float = 0.0
    nbytes: int = 0
    last: Landing | None = None
    waiting: Callable[[float], object] | None = None

    def seconds(self) -> float:
        """Since its begin."""
        return time.monotonic() - self.began

    def wait(self, timeout: float | None) -> BaseException | None:
        """The failure, or None, once it has ended. Raises the TimeoutError of futures."""
        if self.ended.done():
            return self.ended.exception()
        began = time.monotonic()
        try:
            return self.ended.exception(timeout)
        finally:
            if self.waiting is not None:
                self.waiting(time.monotonic() - began)

    def commit(self, record: CheckpointRecord, last: Landing | None) -> None:
        """It is committed; ``last`` as in Committed."""
        self.last = last
        self.over = self.seconds()
        if self.tolerance is not None:
            self.tolerance.committed()
        self.ended.set_result(record)

    def fail(self, error: BaseException) -> None:
        """It has failed, unless it had ended before."""
        if not self.ended.done():
            self.over = self.seconds()
            self.excused = self.tolerance is not None and self.tolerance.excuses(self.path, error)
            self.ended.set_exception(error)


class PendingSave(str):
    """A save under way. It is also the path that the checkpoint will have once it is committed: a str, as TensorFlow's
    ``save`` returns one, equal to it and with all that a str can do. Copied or pickled, it is that str alone.
    """

    __slots__ = ("_progress", "number")

    _progress: Progress
    number: int
    """The checkpoint's."""

    def __new__(cls, path: str, number: int) -> PendingSave:
        made: PendingSave = super().__new__(cls, path)
        made.number = number
        made._progress = Progress(path)
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.path,)

    @property
    def path(self) -> str:
        """The path alone."""
        return str.__str__(self)

    @property
    def nbytes(self) -> int | None:
        """Bytes of the checkpoint, of all ranks together, once it is committed; None before, and if it fails."""
        ended = self._progress.ended
        return ended.result().nbytes if ended.done() and ended.exception() is None else None

    @property
    def stall_seconds(self) -> float:
        """For how long ``save`` held up this rank's training. On a GPU the copy may go on beside what comes next."""
        return self._progress.stall

    @property
    def write_seconds(self) -> float | None:
        """From the call of ``save`` until this rank's part was on storage; None before."""
        return self._progress.written

    @property
    def total_seconds(self) -> float | None:
        """From the call of ``save`` until this rank knew how it ended; None before."""
        return self._progress.over

    def result(self, timeout: float | None = None) -> str:
        """The path, once the checkpoint is committed: durable and visible to everyone.

        The text file ``checkpoint``, which is derived, follows a few milliseconds later; ``CheckpointManager.wait`` waits
        for it. Raises what went wrong, naming ranks: a SaveError, StorageError, CoordinatorError ...; TimeoutError if it is
        not decided within ``timeout`` seconds, which does not count as having been told of a failure.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.path

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None once the checkpoint is committed. TimeoutError as in ``result``."""
        try:
            error = self._progress.wait(timeout)
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

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "failed" if self._progress.ended.exception() else "committed"
        return f"PendingSave({self.path!r}, {state})"


def progress_of(pending: PendingSave) -> Progress:
    """The other side of ``pending``, for who makes the save. Asking it does not count as having been told."""
    return pending._progress


def failure_of(pending: PendingSave) -> BaseException | None:
    """What went wrong and is to end the training, once it is decided; None if training may go on."""
    error = pending.exception()
    return None if progress_of(pending).excused else error


class PendingSaves:
    """The saves of one manager, each until somebody has been told how it ended."""

    def __init__(self) -> None:
        self._saves: list[PendingSave] = []
        self._excused: list[BaseException] = []

    def __iter__(self) -> Iterator[PendingSave]:
        return iter(tuple(self._saves))

    def add(self, pending: PendingSave) -> None:
        """One more."""
        self._saves.append(pending)

    def settle(self, timeout: float | None = None, held_up: Callable[[], bool] = bool) -> list[PendingSave]:
        """Return once none is under way, or after so many seconds, with those that are. A failure stays to be told.

        As long as saves are ``held_up`` by others the seconds do not count, and begin anew when they no longer are.
        """
        ends = {progress_of(pending).ended: pending for pending in self}
        while True:
            was_held_up = held_up()
            late = wait(ends, timeout).not_done
            if not late or not (was_held_up or held_up()):
                return [pending for end, pending in ends.items() if end in late]

    def log_failures(self, error: BaseException, seconds: float) -> None:
        """Log how those end that have failed, or not ended in so many seconds, while ``error`` ended the training loop."""
        deadline = time.monotonic() + seconds
        for pending in self:
            try:
                failure = pending.exception(max(0.0, deadline - time.monotonic()))
            except TimeoutError as late:
                failure = late
            if failure is not None and failure is not error:
                logger.error("while the training loop ended with %r, a save failed too: %s", error, failure)

    def raise_failure(self, among: Sequence[PendingSave], *, at_end: bool = False) -> None:
        """Raise the first failure ``among`` these of which nobody has been told; log the others.

        An excused one is raised ``at_end`` alone, and only if no save has been committed since.
        """
        failed: list[BaseException] = []
        for pending in among:
            progress = progress_of(pending)
            if not pending.done() or progress.collected:
                continue
            error = pending.exception()
            if error is None:
                self._excused.clear()
            elif progress.excused:
                self._excused.append(error)
            else:
                failed.append(error)
        self._saves = [pending for pending in self._saves if not progress_of(pending).collected]
        if at_end:
            failed = [*self._excused, *failed]
            self._excused.clear()
        for error in failed[1:]:
            logger.error("another save failed too: %s", error)
        if failed:
            raise failed[0]
