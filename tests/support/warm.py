"""Processes forked from one that has imported everything: by itself each would need four seconds of a core for that.

``python -m tests.support.warm FD`` serves requests that come through the socket ``FD``, one JSON text each.
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
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from distckpt.testing.system_calls import preloading

ROOT = Path(__file__).parents[2]
MAX_REQUEST_BYTES = 1 << 20
SLOW_TO_IMPORT = (
    "distckpt.coordinator.ray.cluster",  # before anything else that imports Ray: it leaves the process as it was
    "numpy.ma",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "distckpt.coordinator.ray.actor",
    "distckpt.directory.verify",
    "distckpt.manager",
    "distckpt.reader",
    "distckpt.storage.remote.gcs",
    "distckpt.storage.remote.s3",
    "distckpt.testing.faulty",
    "tests.ranks.saves",
    "tests.soak.subject",
    "tests.support.small_runs",
)


class WarmProcess:
    """A process that was forked; to be used as a ``subprocess.Popen``."""

    def __init__(self, warm: Warm, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid = pid
        self.stdin, self.stdout = stdin, stdout
        self._warm = warm
        self._fd = os.pidfd_open(pid)
        self._lock = threading.Lock()  # who waits and who kills may be two threads
        self._status: int | None = None
        weakref.finalize(self, os.close, self._fd)

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()

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
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def _look(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._fd], [], [], timeout)[0]:
            with self._lock:
                if self._status is None:
                    self._status = self._warm.ask({"end": self.pid})
        return self._status


class Warm:
    """The process that forks. ``env`` is for it and its children alone, as far as it works when a program is loaded."""

    def __init__(self, env: Mapping[str, str] = {}) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                pass_fds=[theirs.fileno()],
            )

    def start(
        self, function: str, arguments: Mapping[str, Any], stderr: int = 2, env: Mapping[str, str] | None = None
    ) -> WarmProcess:
        """A new process that calls ``tests.<module>:<name>`` and ends with the status that it returns, or None for 0.

        ``env`` is its whole environment; None: ours.
        """
        their_stdin, stdin = os.pipe()
        stdout, their_stdout = os.pipe()
        request = {"function": function, "arguments": dict(arguments), "env": dict(os.environ if env is None else env)}
        pid = self.ask({"start": request}, [their_stdin, their_stdout, stderr])
        os.close(their_stdin)
        os.close(their_stdout)
        return WarmProcess(self, pid, os.fdopen(stdin, "w"), os.fdopen(stdout))

    def ask(self, request: dict[str, Any], files: list[int] | None = None) -> int:
        """The answer to one request."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files or [])
            return int(self._socket.recv(64))


def warm(preload: str = "") -> Warm:
    """The one that all tests of this process share, for each library to preload. It ends with this process."""
    with _warming:  # of two threads that are the first to ask, each would get one, and one of these would be lost
        return _warm(preload)


_warming = threading.Lock()


@functools.cache
def _warm(preload: str) -> Warm:
    return Warm(preloading(preload) if preload else {})


def run_script(
    script: str | Path, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 50
) -> subprocess.CompletedProcess[str]:
    """``python script arguments...``, as ``subprocess.run`` with ``capture_output`` does it."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = start_script(script, *arguments, env=env, stderr=stderr.fileno())
        impatient = threading.Timer(timeout, process.kill)
        impatient.start()
        with process:
            stdout = process.stdout.read()
            status = process.wait()
        impatient.cancel()
        stderr.seek(0)
        return subprocess.CompletedProcess([str(script)], status, stdout, stderr.read())


def start_script(
    script: str | Path, *arguments: object, env: Mapping[str, str] | None = None, stderr: int = 2
) -> WarmProcess:
    """``python script arguments...``, in the background."""
    argv = [str(script), *map(str, arguments)]
    return warm().start("support.warm:be_script", {"argv": argv}, stderr, {**(os.environ if env is None else env)})


def be_script(argv: list[str]) -> None:
    """Do in this process what ``python`` does with a script and its arguments."""
    sys.argv = argv
    also = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [str(Path(argv[0]).parent), *filter(None, also.split(os.pathsep))]
    main = types.ModuleType("__main__")
    main.__file__ = argv[0]
    sys.modules["__main__"] = main
    exec(compile(Path(argv[0]).read_text(), argv[0], "exec"), main.__dict__)  # noqa: S102 - as python does it


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


def _live(request: dict[str, Any], files: list[int]) -> NoReturn:
    os.environ.clear()
    os.environ.update(request["env"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    try:
        module, name = request["function"].split(":")
        function = getattr(importlib.import_module(f"tests.{module}"), name)
        status = function(**request["arguments"])
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001 - as the interpreter does it; the code of the parent must not go on here
        traceback.print_exc()
        status = 1
    raise SystemExit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
