"""How many saves in a row may fail before training hears of it."""

from __future__ import annotations

import logging
import threading

from distckpt.errors import (
    CommitUnknownError,
    CoordinatorFailedError,
    CoordinatorUnavailableError,
    MissingRanksError,
    RankFailedError,
    StorageError,
    StoreUnsuitableError,
)

logger = logging.getLogger(__name__)

_PASSING = (
    *(StorageError, RankFailedError, MissingRanksError, CommitUnknownError),
    *(CoordinatorUnavailableError, CoordinatorFailedError),
)
"""What may be over by the next save. What a save holds, or a newer run, is the same then."""


class Tolerance:
    """Lets ``allowed`` saves in a row fail, and logs each. For the threads of one rank."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._in_a_row = 0
        self._lock = threading.Lock()

    def committed(self) -> None:
        """A save is committed: the row is over."""
        with self._lock:
            self._in_a_row = 0

    def excuses(self, path: str, error: BaseException) -> bool:
        """Whether training may go on although the save of ``path`` has failed of ``error``."""
        with self._lock:
            self._in_a_row += 1
            row = self._in_a_row
        if row > self._allowed or not isinstance(error, _PASSING) or isinstance(error, StoreUnsuitableError):
            return False
        logger.error(
            "%s was not saved, and training goes on, as this is %d of %d failures in a row that are allowed: %s",
            *(path, row, self._allowed, error),
        )
        return True
