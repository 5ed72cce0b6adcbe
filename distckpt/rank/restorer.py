"""One rank's side of a restore: all ranks restore the same checkpoint, and fall back to an older one together."""

from __future__ import annotations

import dataclasses
import logging
import time

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import Restore, Restored, RestoreFrom, Unknown
from distckpt.directory.locate import Located, located, read_index
from distckpt.errors import DamagedError, DistckptError, MismatchError, RestoreError, StorageError
from distckpt.format.json.log import CheckpointRecord
from distckpt.state.filler import restore_objects
from distckpt.state.objects import NamedObjects
from distckpt.state.status import LoadStatus
from distckpt.storage import Store
from distckpt.world import World

logger = logging.getLogger(__name__)

READ_PAUSES = (0.2, 1.0)


class Restorer:
    """Restores the objects of ``checkpoint`` together with the other ranks, again and again."""

    def __init__(
        self, client: Client, store: Store, checkpoint: NamedObjects, world: World, save_timeout: float
    ) -> None:
        self._client = client
        self._store = store
        self._checkpoint = checkpoint
        self._world = world
        self._timeout = save_timeout
        self._asked = 0

    def restore(self, which: int | str | None, partial: bool) -> CheckpointRecord | None:
        """Restore a number of this run's name, a folder like ``ckpt-42``, or (None) the newest good checkpoint.

        Returns its record; None if there is none to choose from.

        Raises CheckpointNotFoundError, NoGoodCheckpointError, MismatchError, ResizeError, MissingRanksError.
        """
        self._asked += 1
        tried, refused = "", ""
        while True:
            question = Restore(self._asked, which, tried, refused)
            # The coordinator itself answers at the deadline; twice that means that it does not answer at all.
            reply = self._client.ask(question, 2 * self._timeout + 60)
            if isinstance(reply, Restored):
                if reply.record is not None and (reply.record.attempt != tried or refused):
                    raise RestoreError("this answer belongs to an earlier process of this rank: give a new run_id")
                for path, reason in reply.refused:
                    logger.warning("%s was refused and an older checkpoint restored: %s", path, reason)
                return reply.record
            if isinstance(reply, RestoreFrom):
                tried = reply.record.attempt
                try:
                    refused = self._try(reply.record, partial)
                except Exception as error:
                    self._give_up(dataclasses.replace(question, failed=f"{type(error).__name__}: {error}"))
                    raise
            elif isinstance(reply, Unknown):
                tried, refused = "", ""
            else:
                raise RestoreError(f"unexpected answer from the coordinator: {reply!r}")

    def _give_up(self, question: Restore) -> None:
        """Tell the others, who would otherwise wait for this rank."""
        try:
            self._client.ask(question, self._timeout)
        except DistckptError as answer:
            # It is this very failure, sent back; or the coordinator cannot be told, which is not why this rank fails.
            logger.debug("giving up a restore was answered with: %s", answer)

    def _try(self, record: CheckpointRecord, partial: bool) -> str:
        """Restore this one; the reason if its bytes are not what was written, '' if all went well."""
        try:
            where = located(self._store, record)
            status = self._filled(where)
        except (DamagedError, StorageError) as error:
            logger.warning("checkpoint %d cannot be restored here: %s", record.number, error)
            return str(error) or type(error).__name__
        unexpected = [key for key in status.unexpected if self._is_nobodys(key)]
        if not partial and (status.missing or unexpected):
            raise MismatchError(where.path, status.missing, unexpected, {})
        return ""

    def _filled(self, where: Located) -> LoadStatus:
        """Fill the objects. A store that fails to answer is asked again before an older checkpoint is considered."""
        for pause in READ_PAUSES:
            try:
                return restore_objects(self._checkpoint, where, read_index(where), self._world.rank, self._world.size)
            except StorageError as error:
                logger.warning("reading %s failed and is tried again in %g s: %s", where.path, pause, error)
                time.sleep(pause)
        return restore_objects(self._checkpoint, where, read_index(where), self._world.rank, self._world.size)

    def _is_nobodys(self, key: str) -> bool:
        """Whether no rank asks for a key that this one does not: of an object of ours, another rank may hold it."""
        name = key.partition(".")[0].partition("@")[0]
        return self._world.size == 1 or name not in self._checkpoint.objects
