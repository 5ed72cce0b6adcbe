"""The kernel's word that something new is in a folder, where this host's kernel hears of all that is written there."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from distckpt.storage.mounts import mount_of

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent
    from watchdog.observers.api import BaseObserver

logger = logging.getLogger(__name__)

TELLING = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "ramfs", "tmpfs", "xfs", "zfs"}
"""File systems that this host alone writes to, and whose kernel tells of all of it. NFS, FUSE, 9p and the like do not tell
what another host writes, and overlay not what is written to the folders below it."""


def can_ring(path: str, lines: Iterable[str] | None = None) -> bool:
    """Whether the kernel tells of everything that is created below an absolute path, which need not exist yet.

    ``lines`` are those of a ``mountinfo``, the system's own by default.
    """
    mount = mount_of(path, lines)
    return mount is not None and mount.kind in TELLING


class FolderBell:
    """Rings when something has been created in ``folder``, or on the way to it where it is not there yet.

    It may ring without need. What it does not notice is that a folder on the way was moved elsewhere: whoever waits for
    it calls ``listen`` from time to time, which looks. In a process that was forked it begins anew. Costs three threads,
    which sleep until the kernel has something to say. Names that begin with a dot do not ring: they are of writers that
    have not finished.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process = os.getpid()
        self._ringing = _Ringing()
        self._watched: tuple[str, int, int] | None = None
        self._stop = _nothing

    def listen(self) -> bool:
        """Hear of everything from now on, and be silent until then. False if the kernel refuses (it has limits)."""
        if self._process != os.getpid():  # the threads are the parent's; and so is what the kernel tells them
            self._process, self._ringing, self._watched, self._stop = os.getpid(), _Ringing(), None, _nothing
        self._ringing.rung.clear()
        try:
            while (there := _nearest(self._folder)) != self._watched or self._ringing.lost:
                self._watch(there)  # and look again: what was made meanwhile has not been heard
        except OSError as error:
            logger.debug("the kernel does not tell what comes in %s: %s", self._folder, error)
            self.close()
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Whether it rings, or has rung since ``listen``, within so many seconds."""
        return self._ringing.rung.wait(seconds)

    def ring(self) -> None:
        """Wake who waits."""
        self._ringing.rung.set()

    def close(self) -> None:
        """Hear nothing more."""
        if self._process == os.getpid():
            self._stop()
        self._watched, self._stop = None, _nothing

    def _watch(self, there: tuple[str, int, int]) -> None:
        from watchdog.events import DirCreatedEvent, DirDeletedEvent, FileCreatedEvent
        from watchdog.observers.inotify import InotifyObserver

        self.close()
        self._ringing.lost = False
        observer = InotifyObserver()
        what = [FileCreatedEvent if there[0] == self._folder else DirCreatedEvent, DirDeletedEvent]
        try:
            observer.schedule(self._ringing, there[0], event_filter=what)  # type: ignore[arg-type]  # it has ``dispatch``
            observer.start()
        except BaseException:
            _end(observer, self._process)
            raise
        self._watched, self._stop = there, weakref.finalize(self, _end, observer, self._process)


class _Ringing:
    """What the threads hold: not the bell, whose user may forget to close it."""

    def __init__(self) -> None:
        self.rung = threading.Event()
        self.lost = False

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.event_type == "deleted":
            self.lost = True
        if event.event_type == "deleted" or not os.path.basename(os.fsdecode(event.src_path)).startswith("."):
            self.rung.set()


def _nearest(folder: str) -> tuple[str, int, int]:
    """The folder, or the innermost on the way to it that is there; and which one that is."""
    while True:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(folder)
            return folder, status.st_dev, status.st_ino
        folder = os.path.dirname(folder)


def _end(observer: BaseObserver, process: int) -> None:
    if os.getpid() != process:  # in a process that was forked it would take away what its parent listens to
        return
    with contextlib.suppress(RuntimeError):  # it is one of these threads that ends them
        if observer.is_alive():
            observer.stop()
        else:
            observer.on_thread_stop()


def _nothing() -> None: ...
