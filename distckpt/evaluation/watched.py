"""A checkpoint in the hands of whoever evaluates it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from distckpt.directory.exports import read_export
from distckpt.directory.locate import Located, located
from distckpt.directory.reports import write_report
from distckpt.errors import ClaimLostError, DistckptError, LeaseLostError
from distckpt.evaluation.deliveries import Delivery
from distckpt.format import names
from distckpt.reader import CheckpointReader
from distckpt.storage import Store, join

if TYPE_CHECKING:
    from typing_extensions import Self

    from distckpt.checkpoint import Checkpoint
    from distckpt.state.selection import Rename
    from distckpt.state.status import LoadStatus

logger = logging.getLogger(__name__)

OnReport = Callable[["WatchedCheckpoint", Mapping[str, float]], object]


class WatchedCheckpoint:
    """A committed checkpoint, under a lease: it is not deleted until it is settled, or until that lease is lost.

    As a context it is acknowledged when the block ends well, rejected for any Exception, with its text, and released for
    KeyboardInterrupt, SystemExit and a lease that was lost; what was raised goes on. Or call ``ack``, ``release`` or
    ``reject``. It may be used and settled in any thread.

    In a group a worker that is late is replaced: **two workers may both have run a checkpoint, and only one
    acknowledgement counts**. The other one gets a ClaimLostError, and what it has done outside must bear being done twice.
    Reports belong to the attempt, whoever makes them. Without a group there is nothing to say, and nobody to say it to: all
    three let go of the lease.

    ``delivery`` counts from 1 how often the group has given it to a worker. A release takes that delivery back, all but the
    first; who puts it back with ``distckpt groups retry`` begins anew at 2.
    """

    def __init__(
        self,
        store: Store,
        delivery: Delivery,
        group: str | None,
        worker: str,
        on_settled: Callable[[], object],
        on_report: OnReport | None,
    ) -> None:
        record = delivery.record
        self.path = join(store.url, names.checkpoint_folder(record.name, record.number))
        self.number = record.number
        self.attempt = record.attempt
        self.group = group
        self.delivery = delivery.count
        self._store = store
        self._record = record
        self._lease = delivery.lease
        self._settlement = delivery.settlement
        self._on_settled = on_settled
        self._on_report = on_report
        self._worker = worker
        self._lock = threading.Lock()
        self._settled = ""

    def __repr__(self) -> str:
        return f"<WatchedCheckpoint {self.path}, attempt {self.attempt}, delivery {self.delivery}>"

    @property
    def is_settled(self) -> bool:
        """Whether it was acknowledged, released or rejected, or that was tried."""
        return self._settled != ""

    def check(self) -> None:
        """LeaseLostError if the checkpoint may have been deleted, since its lease could not be renewed in time.

        ValueError once it is settled, which ends the lease. Reads look by themselves, before and after, also those of what
        ``open`` gave: what they return was there.
        """
        if self._settled:
            raise ValueError(f"{self.path} was {self._settled}, so nothing keeps it from being deleted: read it before")
        self._lease.check()

    def open(self) -> CheckpointReader:
        """It, open for reading until it is settled. DamagedError if it is not what was written; else as ``check``."""
        return CheckpointReader(self._where(), self.check)

    def export_path(self) -> str | None:
        """The path of what was exported from it, or None: then nothing has been, or not yet. Raises what ``open`` raises."""
        self.check()
        folder = names.attempt_folder(self._record.name, self._record.number, self.attempt)
        try:
            export = read_export(self._store, folder)
        finally:
            self.check()
        return None if export is None else join(self._store.url, folder, export.folder)

    def load(self, select: str | Sequence[str] | None = None) -> Any:
        """What was saved, with whole tensors on the CPU, whatever number of ranks wrote it: see CheckpointReader.load."""
        with self.open() as reader:
            return reader.load(select)

    def restore(
        self,
        checkpoint: Checkpoint,
        *,
        partial: bool = False,
        select: str | Sequence[str] | None = None,
        rename: Rename | None = None,
        progress: bool = False,
    ) -> LoadStatus:
        """Fill the objects of ``checkpoint``: this very attempt, also if its number was saved again. See Checkpoint.restore.

        It reads what this rank holds and talks to nobody: where a torch process group is initialized it takes its rank from
        there, so the ranks of an evaluation may hold the model in another way than those that trained it.
        """
        from distckpt.checkpoint import fill  # it imports torch

        where = self._where()
        status = fill(checkpoint, where, partial, select, rename, progress)
        self.check()
        return status

    def report(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """Say what was found out about this attempt, ``{"loss": 1.2}``: all who list checkpoints see it, and retention goes

        by it. On storage when it returns; may be called again, for other metrics or with better figures. Afterwards
        ``on_report`` of ``watch`` is called with this checkpoint and the metrics. Raises what ``write_report`` raises.
        """
        report = write_report(self._store, self.attempt, metrics, self._worker)
        if self._on_report is not None:
            self._on_report(self, report.metrics)

    def ack(self) -> None:
        """It is done: nobody of the group gets it again. ClaimLostError if that does not count; nothing if it is settled.

        StorageError if it cannot be told whether it counts: it is delivered again then, unless it does.
        """
        self._settle("acknowledged", self._settlement.ack)

    def release(self) -> None:
        """Give it back without blame: some worker gets it after a while. ClaimLostError if it was not ours any more."""
        self._settle("released", self._settlement.release)

    def reject(self, error: str | BaseException = "") -> None:
        """Give it back with blame: some worker gets it after a while, or nobody, after ``max_attempts`` of the group.

        ``error`` says why, to people. ClaimLostError if it was not ours any more.
        """
        why = _in_words(error) if isinstance(error, BaseException) else str(error)
        self._settle("rejected", lambda: self._settlement.reject(why))

    def _settle(self, how: str, settle: Callable[[], bool]) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = how
        try:
            is_ours = settle()
        finally:
            self._lease.release()
            self._on_settled()
        if not is_ours:
            raise ClaimLostError(self.path, self.group or "", self.delivery)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ack()
            return
        try:
            if isinstance(error, Exception) and not isinstance(error, LeaseLostError):
                self.reject(error)
            else:
                self.release()
        except DistckptError as settling:
            logger.warning("%s could not be given back, so its claim will run out: %s", self.path, settling)

    def _where(self) -> Located:
        self.check()
        try:
            return located(self._store, self._record)
        finally:
            self.check()


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # noqa: BLE001 - an error that cannot say what it is must not keep its checkpoint
        return type(error).__name__
