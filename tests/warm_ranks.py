"""Rank processes, forked from one that has imported everything: by itself each would need four seconds of a core for that.

``python -m tests.warm_ranks FD`` serves requests that come through the socket ``FD``, one JSON text each.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
MAX_REQUEST_BYTES = 1 << 20
SLOW_TO_IMPORT = ("ray", "torch.distributed.fsdp", "distckpt.coordinator.actor", "distckpt.manager", "tests.scenarios")


class WarmRank:
    """One rank's process; to be used as a ``subprocess.Popen``."""

    def __init__(self, warm: Warm, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.stdin, self.stdout = stdin, stdout
        self._warm = warm
        self._pid = pid
        self._fd = os.pidfd_open(pid)
        self._status: int | None = None
        weakref.finalize(self, os.close, self._fd)

    def send_signal(self, number: int) -> None:
        """As Popen."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        """As Popen."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """As Popen."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """As Popen."""
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"rank process {self._pid}", timeout or 0)
        return status

    def _look(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._fd], [], [], timeout)[0]:
            self._status = self._warm.ask({"end": self._pid})
        return self._status


class Warm:
    """The process that forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_ranks", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )

    def start(self, env: Mapping[str, str], log: IO[str]) -> WarmRank:
        """A new process with the environment ``env``, whose stderr is ``log``."""
        their_stdin, stdin = os.pipe()
        stdout, their_stdout = os.pipe()
        pid = self.ask({"start": dict(env)}, [their_stdin, their_stdout, log.fileno()])
        os.close(their_stdin)
        os.close(their_stdout)
        return WarmRank(self, pid, os.fdopen(stdin, "w"), os.fdopen(stdout))

    def ask(self, request: dict[str, Any], files: list[int] | None = None) -> int:
        """The answer to one request."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], files or [])
        return int(self._socket.recv(64))


@functools.cache
def warm() -> Warm:
    """The one that all tests of this process share. It ends with this process."""
    return Warm()


# ---- the warm process -----------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all of this process's memory
    while True:
        data, files, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not data:
            return
        request = json.loads(data)
        if "end" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["end"], 0)[1])
        else:
            assert threading.active_count() == 1
            answer = os.fork()
            if answer == 0:
                requests.close()
                _live(request["start"], files)
        for file in files:
            os.close(file)
        requests.send(str(answer).encode())


def _live(env: dict[str, str], files: list[int]) -> None:
    from tests.gang import serve

    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    try:
        serve()
    except BaseException:  # noqa: BLE001 - a child must never run on into the code of its parent
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
