"""The checkpoint that frozen parameters come from is kept for as long as those that need it."""

from __future__ import annotations

import hashlib
import logging
import re
import time

from distckpt.directory.locate import Located
from distckpt.directory.tags import tag
from distckpt.errors import StorageError
from distckpt.state.base import base_of
from distckpt.state.objects import NamedObjects

logger = logging.getLogger(__name__)

_MOST_OF_NAME = 40


class Reference:
    """Tags what ``frozen_from`` of the objects names, on behalf of the checkpoints in ``directory``; rank 0 does it, once."""

    def __init__(self, checkpoint: NamedObjects, directory: str, rank: int) -> None:
        self._checkpoint = checkpoint
        self._directory = directory
        self._is_held = rank != 0

    def hold(self) -> None:
        """From now on no retention takes the base. CheckpointNotFoundError if one already has.

        A base that nobody retires, as its log was left behind, needs no tag; one that cannot be written to is warned of.
        """
        if self._is_held or (base := base_of(self._checkpoint)) is None:
            return
        if not base.stored.where.is_lone:
            self._tag(base.stored.where)
        self._is_held = True

    def _tag(self, where: Located) -> None:
        attempt = where.folder.rpartition("/")[2]
        name = reference_name(self._directory, attempt)
        try:
            tag(where.store, name, attempt, self._directory, "frozen parameters of its checkpoints", time.time())
        except StorageError as error:
            logger.warning(
                "%s has the frozen parameters of the checkpoints in %s, and could not be tagged so that no retention takes "
                "it (%s): run `distckpt pin %s` as somebody who may write there",
                where.path,
                self._directory,
                error,
                where.path,
            )


def reference_name(directory: str, attempt: str) -> str:
    """The tag of a base on behalf of a directory: for people the name of that, and eight digits that make it the only one.

    They follow a dot: after a dash, they would be the number of a checkpoint if none of them was a letter.
    """
    of = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.rpartition("/")[2])[:_MOST_OF_NAME]
    return f"base-of-{of}.{hashlib.sha256(f'{directory} {attempt}'.encode()).hexdigest()[:8]}"
