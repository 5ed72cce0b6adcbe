"""One rank's side of a restore: all ranks restore the same checkpoint, and fall back to an older one together.

Objects are filled only once all ranks have said how theirs match, and if that will do.
"""

from __future__ import annotations

import dataclasses
import logging

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import (
    LISTED_KEYS,
    FillFrom,
    KeyMatch,
    MatchWith,
    Mismatched,
    Restore,
    Restored,
    RestoreStage,
    Unknown,
)
from distckpt.directory.locate import located, read_index
from distckpt.errors import DamagedError, DistckptError, MismatchError, RestoreError, StorageError
from distckpt.format.json.log import CheckpointRecord
from distckpt.state.filler import Filler
from distckpt.state.objects import NamedObjects
from distckpt.state.selection import EVERYTHING, Selection
from distckpt.state.status import LoadStatus, describe
from distckpt.storage import Store
from distckpt.world import World

logger = logging.getLogger(__name__)


class Restorer:
    """Restores the objects of ``checkpoint`` together with the other ranks, again and again.

    ``status`` is how keys matched in the last restore of a checkpoint, None before.
    """

    def __init__(
        self, client: Client, store: Store, checkpoint: NamedObjects, world: World, save_timeout: float
    ) -> None:
        self.status: LoadStatus | None = None
        self._client = client
        self._store = store
        self._checkpoint = checkpoint
        self._world = world
        self._timeout = save_timeout
        self._asked = 0
        self._filler: tuple[str, Filler] | None = None
        self._selection = EVERYTHING

    def restore(
        self, which: int | str | None, partial: bool, selection: Selection = EVERYTHING
    ) -> CheckpointRecord | None:
        """Restore a number of this run's name, a folder like ``ckpt-42``, or (None) the newest good checkpoint.

        Returns its record; None if there is none to choose from.

        Raises CheckpointNotFoundError, NoGoodCheckpointError, MismatchError, ResizeError, MissingRanksError.
        """
        self._asked += 1
        self._selection = selection
        try:
            return self._restore(Restore(self._asked, which, partial=partial))
        finally:
            self._filler = None

    def _restore(self, question: Restore) -> CheckpointRecord | None:
        first = report = question
        while True:
            # The coordinator itself answers at the deadline; twice that means that it does not answer at all.
            reply = self._client.ask(report, 2 * self._timeout + 60)
            match reply:
                case MatchWith() | FillFrom():
                    try:
                        report = self._try(first, reply)
                    except Exception as error:
                        failed = f"{type(error).__name__}: {error}"
                        self._give_up(dataclasses.replace(first, tried=reply.record.attempt, failed=failed))
                        raise
                case Mismatched(record, keys):
                    raise self._mismatch(self._matched(record), keys)
                case Restored(record, refused):
                    if record is not None and (report.tried, report.stage, report.refused) != (
                        record.attempt,
                        "fill",
                        "",
                    ):
                        raise _not_ours()
                    for path, reason in refused:
                        logger.warning("%s was refused and an older checkpoint restored: %s", path, reason)
                    return record
                case Unknown():
                    report = first
                case _:
                    raise RestoreError(f"unexpected answer from the coordinator: {reply!r}")

    def _try(self, first: Restore, wanted: MatchWith | FillFrom) -> Restore:
        """Do what is wanted with a checkpoint, and what is to be reported then."""
        record = wanted.record
        report = dataclasses.replace(first, tried=record.attempt)
        try:
            if isinstance(wanted, FillFrom):
                self._fill(self._matched(record), wanted.keys)
                return dataclasses.replace(report, stage="fill")
            return dataclasses.replace(report, keys=self._match(record, first.partial))
        except (DamagedError, StorageError) as error:
            logger.warning("checkpoint %d cannot be restored here: %s", record.number, error)
            refused = str(error) or type(error).__name__
            stage: RestoreStage = "fill" if isinstance(wanted, FillFrom) else "match"
            return dataclasses.replace(report, stage=stage, refused=refused)

    def _match(self, record: CheckpointRecord, partial: bool) -> KeyMatch:
        where = located(self._store, record)
        rank, size = self._world.rank, self._world.size
        filler = Filler(self._checkpoint, where, read_index(where), rank, size, partial, self._selection)
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

    def _fill(self, filler: Filler, keys: KeyMatch) -> None:
        mine = filler.fill()
        self.status = status = LoadStatus(
            mine.path,
            list(dict.fromkeys((*mine.missing, *keys.missing))),
            filler.keys_of(keys.unclaimed),
            mine.matched,
            {**dict(keys.misfits), **mine.mismatched},
        )
        if not status.is_complete:
            logger.warning("%s", describe(status))

    def _mismatch(self, filler: Filler, keys: KeyMatch) -> MismatchError:
        unexpected = filler.keys_of(keys.unclaimed)
        counts = keys.missing_count, keys.misfit_count
        return MismatchError(filler.path, keys.missing, unexpected, dict(keys.misfits), *counts)

    def _give_up(self, question: Restore) -> None:
        """Tell the others, who would otherwise wait for this rank."""
        try:
            self._client.ask(question, self._timeout)
        except DistckptError as answer:
            # It is this very failure, sent back; or the coordinator cannot be told, which is not why this rank fails.
            logger.debug("giving up a restore was answered with: %s", answer)


def _not_ours() -> RestoreError:
    return RestoreError("this answer belongs to an earlier process of this rank: give a new run_id")
