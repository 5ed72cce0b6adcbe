"""One rank's side of a restore: all ranks restore the same checkpoint, and fall back to an older one together.

Objects are filled only once all ranks have said how theirs match, and if that will do. What a refused checkpoint has
touched is filled by the next one, or nothing was touched: a partial restore checks every byte before, since what an older
checkpoint lacks stays as it was; and all but tensors in their own places is changed when no rank can refuse any more.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

from distckpt.coordinator.messages import (
    LISTED_KEYS,
    FillFrom,
    FinishWith,
    KeyMatch,
    MatchWith,
    Mismatched,
    Reply,
    Restore,
    Restored,
    RestoreStage,
    Unknown,
)
from distckpt.directory.locate import located, read_index
from distckpt.errors import (
    DamagedError,
    DistckptError,
    MismatchError,
    NoGoodCheckpointError,
    RestoreError,
    StorageError,
)
from distckpt.format.json.left_out import note_on
from distckpt.format.json.log import CheckpointRecord
from distckpt.state.filler import Filler, start_from_base
from distckpt.state.objects import NamedObjects
from distckpt.state.selection import EVERYTHING, Selection
from distckpt.state.status import LoadStatus, describe
from distckpt.state.stored import Committed
from distckpt.storage import Store
from distckpt.world import World

logger = logging.getLogger(__name__)

TELL_SECONDS = 10.0
"""How long a rank that gives a restore up tries to tell the others."""


class Table(Protocol):
    """Where the ranks meet that restore together: the coordinator, or a consultation of their own."""

    def ask(self, request: Restore, timeout: float, /) -> Reply:
        """What is wanted of this rank next, or what came of the restore. Raises the error that ends it for all."""


class Restorer:
    """Restores the objects of ``checkpoint`` together with the other ranks, again and again.

    ``status`` is how keys matched in the last restore of a checkpoint, None before; ``bytes_read`` is what this rank read
    for it.
    """

    def __init__(
        self,
        table: Table,
        store: Store,
        checkpoint: NamedObjects,
        world: World,
        save_timeout: float,
        shown: bool = False,
    ) -> None:
        self.status: LoadStatus | None = None
        self.bytes_read = 0
        self._table = table
        self._store = store
        self._checkpoint = checkpoint
        self._world = world
        self._timeout = save_timeout
        self._shown = shown
        self._asked = 0
        self._filler: tuple[str, Filler] | None = None
        self._selection = EVERYTHING
        self._refused: tuple[tuple[str, str], ...] = ()
        self._is_touched = False
        self._kept = ""

    def restore(
        self, which: int | str | None, partial: bool, selection: Selection = EVERYTHING
    ) -> CheckpointRecord | None:
        """Restore a number of this run's name, a folder like ``ckpt-42``, or (None) the newest good checkpoint.

        Returns its record; None if there is none to choose from.

        Raises CheckpointNotFoundError, NoGoodCheckpointError, MismatchError, ResizeError, MissingRanksError.
        """
        self._asked += 1
        self._selection = selection
        self._refused, self._is_touched, self._kept, self.bytes_read = (), False, "", 0
        question = Restore(self._asked, which, partial=partial)
        try:
            return self._restore(question)
        except DistckptError:
            raise  # all ranks have been told it, or this one has told them
        except BaseException as error:  # Ctrl-C too
            self._give_up(question, error)
            raise
        finally:
            self._filler = None

    def _restore(self, question: Restore) -> CheckpointRecord | None:
        first = report = question
        while True:
            # The coordinator itself answers at the deadline; twice that means that it does not answer at all.
            reply = self._table.ask(report, 2 * self._timeout + 60)
            match reply:
                case MatchWith() | FillFrom() | FinishWith():
                    try:
                        report = self._try(first, reply)
                    except DistckptError as error:
                        self._give_up(first, error)
                        raise
                case Mismatched(record, keys):
                    mismatch = self._mismatch(self._matched(record), keys)
                    if self._is_touched:
                        raise self._spoiled(mismatch.path, mismatch) from mismatch
                    raise mismatch
                case Restored(record, refused):
                    if record is not None and (report.tried, report.stage, report.refused) != (
                        record.attempt,
                        "finish",
                        "",
                    ):
                        raise _not_ours()
                    for path, reason in refused:
                        logger.warning("%s was refused and an older checkpoint restored: %s", path, reason)
                    if record is None:
                        start_from_base(self._checkpoint, self._world.rank, self._world.size)
                    return record
                case Unknown():
                    report = first
                case _:
                    raise RestoreError(f"unexpected answer from the coordinator: {reply!r}")

    def _try(self, first: Restore, wanted: MatchWith | FillFrom | FinishWith) -> Restore:
        """Do what is wanted with a checkpoint, and what is to be reported then."""
        record = wanted.record
        report = dataclasses.replace(first, tried=record.attempt, round=wanted.round)
        if isinstance(wanted, FinishWith):
            self._kept = record.attempt
            self._finish(self._matched(record), wanted.keys)
            return dataclasses.replace(report, stage="finish")
        try:
            if isinstance(wanted, FillFrom):
                self._is_touched = True
                self._kept = record.attempt if first.partial else self._kept
                self._matched(record).read()
                return dataclasses.replace(report, stage="fill")
            self._refused = wanted.refused
            return dataclasses.replace(report, keys=self._match(record, first.partial))
        except (DamagedError, StorageError) as error:
            logger.warning("checkpoint %d cannot be restored here: %s", record.number, error)
            refused = str(error) or type(error).__name__
            stage: RestoreStage = "fill" if isinstance(wanted, FillFrom) else "match"
            return dataclasses.replace(report, stage=stage, refused=refused)

    def _match(self, record: CheckpointRecord, partial: bool) -> KeyMatch:
        where = located(self._store, record)
        if self._kept not in ("", record.attempt):
            reason = "the objects hold something of another one, which it may lack"
            raise self._spoiled(where.path, RestoreError(reason))
        rank, size = self._world.rank, self._world.size
        try:
            filler = Filler(
                self._checkpoint, Committed(where, read_index(where)), rank, size, partial, self._selection, self._shown
            )
        except (RestoreError, KeyError, ValueError) as error:
            if self._is_touched:
                raise self._spoiled(where.path, error) from error
            raise
        if partial and filler.matched:
            filler.check()
        self._filler = record.attempt, filler
        missing, misfits = filler.missing, filler.misfits
        return KeyMatch(
            filler.unclaimed,
            filler.matched,
            tuple(missing[:LISTED_KEYS]),
            tuple(misfits.items())[:LISTED_KEYS],
            len(missing),
            len(misfits),
        )

    def _matched(self, record: CheckpointRecord) -> Filler:
        """What has been matched with this one."""
        if self._filler is None or self._filler[0] != record.attempt:
            raise _not_ours()
        return self._filler[1]

    def _finish(self, filler: Filler, keys: KeyMatch) -> None:
        mine = filler.finish()
        self.bytes_read = filler.bytes_read
        self.status = status = LoadStatus(
            mine.path,
            list(dict.fromkeys((*mine.missing, *keys.missing))),
            filler.keys_of(keys.unclaimed),
            mine.matched,
            {**dict(keys.misfits), **mine.mismatched},
            filler.left_out,
        )
        if not status.is_complete:
            logger.warning("%s", describe(status))

    def _mismatch(self, filler: Filler, keys: KeyMatch) -> MismatchError:
        unexpected = filler.keys_of(keys.unclaimed)
        counts = keys.missing_count, keys.misfit_count
        note = note_on(keys.missing, filler.left_out)
        return MismatchError(filler.path, keys.missing, unexpected, dict(keys.misfits), *counts, note)

    def _spoiled(self, path: str, error: Exception) -> NoGoodCheckpointError:
        """What to raise for ``error`` when it is too late to say that nothing has been changed."""
        refused = (*self._refused, (path, f"{type(error).__name__}: {error}"))
        return NoGoodCheckpointError(self._store.url, refused, spoiled=True)

    def _give_up(self, question: Restore, error: BaseException) -> None:
        """Tell the others, who would otherwise wait for this rank."""
        failed = f"{type(error).__name__}: {error}".removesuffix(": ")
        try:
            self._table.ask(dataclasses.replace(question, failed=failed), min(self._timeout, TELL_SECONDS))
        except Exception as answer:  # noqa: BLE001 - what is being raised comes first
            # It is this very failure, sent back; or the coordinator cannot be told, which is not why this rank fails.
            logger.debug("giving up a restore was answered with: %s", answer)


def _not_ours() -> RestoreError:
    return RestoreError("this answer belongs to an earlier process of this rank: give a new run_id")
