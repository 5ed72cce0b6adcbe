"""Keeps what a command starts for as long as another process lives, and then ends all of it. A program of its own.

python -I -S keeper.py PARENT FOLDER COMMAND...

Says the command's exit status in one line. Once PARENT is gone, however it ended, or at a SIGTERM, everything in its
session is killed, and FOLDER deleted. It stays as long as training does, so it imports nothing that it can do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator

STARTING_SECONDS = 0.02
KEEPING_SECONDS = 1.0
"""How long it sleeps between two looks at its parent, while the command runs and afterwards."""

FOR_THE_TRAINING = (signal.SIGINT, signal.SIGHUP)
BECOME_SUBREAPER = 36
"""``prctl``: those in the session whose parents die become children of this process, which sees them out."""

_told_to_end = False


def main(parent: int, folder: str, command: list[str]) -> None:
    """Start ``command``; return when everything is gone."""
    for number in FOR_THE_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    try:
        _keep(parent, command)
    finally:
        _kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def _keep(parent: int, command: list[str]) -> None:
    to_the_log = [(os.POSIX_SPAWN_DUP2, 2, 1)]
    starting = os.posix_spawn(command[0], command, os.environ, file_actions=to_the_log, setsigdef=FOR_THE_TRAINING)
    while os.getppid() == parent and not _told_to_end:
        for child, status in _ended():
            if child == starting:
                starting = 0
                os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os.close(1)
        time.sleep(STARTING_SECONDS if starting else KEEPING_SECONDS)


def _kill_all() -> None:
    while others := list(_others()):
        for other in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        time.sleep(STARTING_SECONDS)
        list(_ended())


def _end(*_: object) -> None:
    global _told_to_end
    _told_to_end = True


def _ended() -> Iterator[tuple[int, int]]:
    """Each child that has ended, with its status."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        yield child, status


def _others() -> Iterator[int]:
    """The processes of this session that live, but for this one."""
    session = str(os.getsid(0))
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    state, _, _, its = stat.read().rpartition(b")")[2].decode().split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if its == session and state not in "ZX":
                yield int(name)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
