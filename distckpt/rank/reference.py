"""The checkpoint that frozen parameters come from is kept for as long as those that need it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time

from distckpt.directory.locate import Located
from distckpt.directory.tags import tag
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.format import names
from distckpt.state.base import base_of
from distckpt.state.objects import NamedObjects

logger = logging.getLogger(__name__)

_MOST_OF_NAME = 40

_SELDOM = 15
"""Saves, at the most, for which it is not tried again to tag a base that could not be tagged."""


class Reference:
    """Tags what ``frozen_from`` of the objects names, on behalf of the checkpoints in ``directory``; rank 0 does it."""

    def __init__(self, checkpoint: NamedObjects, directory: str, rank: int) -> None:
        self._checkpoint = checkpoint
        self._directory = directory
        self._is_held = rank != 0
        self._failures = 0
        self._saves_to_wait = 0

    def hold(self) -> None:
        """From now on no retention takes the base. CheckpointNotFoundError if one already has, or it is gone.

        A base that nobody retires, as its log was left behind, needs no tag; one that cannot be written to is warned of, and
        later saves try again, ever more seldom.
        """
        if self._is_held or (base := base_of(self._checkpoint)) is None:
            return
        if self._saves_to_wait:
            self._saves_to_wait -= 1
            return
        where = base.stored.where
        self._is_held = self._is_kept(where)
        if not self._is_held:
            self._saves_to_wait = min(2**self._failures - 1, _SELDOM)
            self._failures += 1

    def _is_kept(self, where: Located) -> bool:
        """Whether it will stay. CheckpointNotFoundError if it did not."""
        attempt = where.folder.rpartition("/")[2]
        name = reference_name(self._directory, attempt)
        try:
            if where.is_lone:
                self._check_there(where)
                return True
            tag(where.store, name, attempt, self._directory, "frozen parameters of its checkpoints", time.time())
        except StorageError as error:
            with contextlib.suppress(StorageError):  # of what cannot be asked nobody knows that it is gone
                self._check_there(where)
            logger.warning(
                "%s has the frozen parameters of the checkpoints in %s, and could not be tagged so that no retention takes "
                "it (%s). Later saves try again; if nobody may write there, run `distckpt pin %s` as somebody who may",
                where.path,
                self._directory,
                error,
                where.path,
            )
            return False
        return True

    def _check_there(self, where: Located) -> None:
        if where.store.stat(where.object_path(names.MANIFEST)) is None:
            raise CheckpointNotFoundError(
                where.path,
                f"it has the frozen parameters of the checkpoints in {self._directory}, and is gone. Without it none of them "
                "could be restored: put it back, or give a copy of it as frozen_from",
            )


def reference_name(directory: str, attempt: str) -> str:
    """The tag of a base on behalf of a directory: for people the name of that, and eight digits that make it the only one.

    They follow a dot: after a dash, they would be the number of a checkpoint if none of them was a letter.
    """
    of = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.rpartition("/")[2])[:_MOST_OF_NAME]
    return f"base-of-{of}.{hashlib.sha256(f'{directory} {attempt}'.encode()).hexdigest()[:8]}"
