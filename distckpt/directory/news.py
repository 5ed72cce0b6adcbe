"""When to look at a log again: as soon as it may have grown, and hardly ever otherwise."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from distckpt.directory.log import sequence_numbers
from distckpt.errors import StorageError
from distckpt.format import names
from distckpt.storage import Store, join
from distckpt.storage.bell import FolderBell, can_ring

logger = logging.getLogger(__name__)

LEAST_PAUSE = 0.1
MOST_PAUSE = 5.0
MOST_PAUSE_OF_FILES = 1.0
"""Seconds between two looks: the least, right after news; and the most, of a store at a URL and of a file system."""

GROWTH = 1.5
"""How much longer each pause is than the one before, while nothing comes."""

DOUBT_SECONDS = 10.0
"""How often it is looked for itself where the kernel tells: a folder may have been moved away under its eyes."""

LOOKS_AHEAD = 8
"""How many times in a row it is asked for the next entry alone, and not whether the last one known is there still."""


class News(Protocol):
    """Says when the log of a directory may have grown. For one thread at a time, but for ``close``."""

    @property
    def newest(self) -> int:
        """The highest number of the log that is known here; 0 if none is."""

    def wait(self, seconds: float) -> None:
        """Return when the log may have grown since the last call, at once if it has, or after ``seconds``.

        The first call returns at once: so whoever reads the log after each call misses nothing. Raises nothing that has to
        do with the store: who reads the log hears of that.
        """

    def close(self) -> None:
        """End a ``wait`` in any thread; from now on each returns at once."""


def news_of(store: Store) -> News:
    """News from storage alone: told by the kernel where it tells of all that is written there, else by looking again.

    An idle look is one small request, whatever the directory holds: at a URL whether the next entry is there; of files it
    is a listing of the log, which is short, because on NFS a name that was asked for too early is taken for absent for
    long. The pause between looks grows from ``LEAST_PAUSE`` to the most while nothing comes. Directory and log need not
    exist yet.
    """
    folder = join(store.url, names.LOG)
    return _StorageNews(store, FolderBell(folder) if "://" not in folder and can_ring(folder) else None)


class _StorageNews:
    """See news_of."""

    def __init__(self, store: Store, bell: FolderBell | None) -> None:
        self._store = store
        self._bell = bell
        self._is_remote = "://" in store.url
        self._closed = threading.Event()
        self._newest = -1
        self._pause = LEAST_PAUSE
        self._ahead = 0
        self._looked = 0.0
        self._failed = False

    @property
    def newest(self) -> int:
        """See News.newest."""
        return max(self._newest, 0)

    def wait(self, seconds: float) -> None:
        """See News.wait."""
        deadline = time.monotonic() + seconds
        while True:
            told = self._bell is not None and self._bell.listen()
            if self._closed.is_set():
                self._let_go()  # of what was begun while another thread closed it
                return
            if self._look():
                self._pause = LEAST_PAUSE
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if self._bell is not None and told:
                self._bell.wait(min(DOUBT_SECONDS, left))
            elif not self._closed.wait(min(self._pause, left)):
                self._pause = min(self._pause * GROWTH, MOST_PAUSE if self._is_remote else MOST_PAUSE_OF_FILES)

    def close(self) -> None:
        """See News.close."""
        self._closed.set()
        self._let_go()
        if self._bell is not None:
            self._bell.ring()

    def _let_go(self) -> None:
        if self._bell is not None:
            self._bell.close()

    def _look(self) -> bool:
        """Whether the log is another one than at the last look. What cannot be read has not changed."""
        try:
            newest = self._newest_now()
        except StorageError as error:
            if not self._failed:
                logger.warning("looking whether the log of %s has grown failed: %s", self._store.url, error)
            self._failed = True
            return False
        self._failed = False
        changed = newest != self._newest
        self._newest = newest
        return changed

    def _newest_now(self) -> int:
        if self._newest > 0 and self._is_remote and not self._is_other():
            return self._newest
        return max(sequence_numbers(self._store), default=0)

    def _is_other(self) -> bool:
        """Whether the next entry is there, or the last known one is not: it was pruned, or the directory made anew."""
        if self._store.stat(names.entry_path(self._newest + 1)) is not None:
            return True
        now = time.monotonic()
        self._ahead = self._ahead + 1 if now - self._looked < 2 * MOST_PAUSE else LOOKS_AHEAD
        self._looked = now
        if self._ahead < LOOKS_AHEAD:
            return False
        self._ahead = 0
        return self._store.stat(names.entry_path(self._newest)) is None
