"""Running a command for each checkpoint: how it ends is the acknowledgement, and a signal ends it in good order."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO

from distckpt.errors import CheckpointNotFoundError, ClaimLostError, LeaseLostError, StorageError
from distckpt.evaluation.watch import Watch
from distckpt.evaluation.watched import WatchedCheckpoint
from distckpt.format.json.group import MAX_TEXT

logger = logging.getLogger(__name__)

LAST_LINES = 20
"""Lines of the command's error output that a rejection quotes."""

CHUNK_BYTES = 1 << 16
MOST_OF_A_LINE = 4 * MAX_TEXT
"""Bytes of a line that has not ended yet which are kept: as many as MAX_TEXT characters can have."""

LOOK_SECONDS = 1.0
KILL_SECONDS = 10.0
"""For so long a command may take to end, once it was told to because its checkpoint may be gone."""

_PLACES = re.compile(r"\{path\}|\{number\}")

Prepare = Callable[[WatchedCheckpoint], AbstractContextManager[str]]
"""Makes of a checkpoint what stands in the command for ``{path}``, for as long as the command runs."""


class NotStartedError(ValueError):
    """The command could not be started. That is this worker's fault, and would be the same for every checkpoint."""


class CommandRunner:
    """Runs ``command`` for every checkpoint of a watch, one after the other. In each word ``{path}`` and ``{number}`` are
    replaced.

    Exit status 0 acknowledges; any other rejects, with the status and the last lines of the error output, which goes where
    ours goes all the same. If the command cannot be started at all, no checkpoint is to blame: it is released.
    ``told`` is called with a sentence on each that has ended. ``stop`` may be called by any other thread.
    """

    def __init__(self, watch: Watch, command: Sequence[str], prepare: Prepare, told: Callable[[str], object]) -> None:
        self._watch = watch
        self._command = command
        self._prepare = prepare
        self._told = told
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = 0

    def run(self) -> None:
        """Until the watch ends, or ``stop``. Raises what the watch raises, ValueError if the command cannot be started."""
        for checkpoint in self._watch:
            try:
                said = self._run(checkpoint)
            except ClaimLostError as error:
                said = str(error)
            self._told(f"{checkpoint.path}, delivery {checkpoint.delivery}: {said}")

    def stop(self, number: int) -> None:
        """Pass a signal on to the command, whose checkpoint is released when it has ended; and end the watch."""
        with self._lock:
            self._stopped = number
            if self._process is not None:
                _send(self._process, number)
                return
        self._watch.close()

    def _run(self, checkpoint: WatchedCheckpoint) -> str:
        """What became of it, in words."""
        try:
            with self._prepare(checkpoint) as path:
                process = self._started([_filled(word, path, checkpoint.number) for word in self._command])
                if process is None:
                    checkpoint.release()
                    return "released, since this worker was stopped"
                status, lines = self._finished(process, checkpoint)
                if status:
                    checkpoint.check()  # what fails because its checkpoint was deleted is not to blame
        except (LeaseLostError, NotStartedError) as error:
            checkpoint.release()
            if isinstance(error, NotStartedError):
                raise
            return f"released: {error}"
        except Exception as error:
            checkpoint.reject(error)
            if isinstance(error, StorageError | ClaimLostError):
                raise
            return f"rejected: {error}"
        if self._stopped:
            checkpoint.release()
            self._watch.close()
            return f"released, since this worker was stopped by signal {self._stopped}"
        if status == 0:
            checkpoint.ack()
            return "acknowledged"
        ended = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
        checkpoint.reject(_fitting(ended, lines))
        return f"rejected: {ended}"

    def _started(self, command: list[str]) -> subprocess.Popen[bytes] | None:
        """The command, in a session of its own: so a signal from the terminal comes to it once, from us. None if stopped."""
        with self._lock:
            if self._stopped:
                return None
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:
                raise NotStartedError(f"the command cannot be started: {error}") from error
            return self._process

    def _finished(self, process: subprocess.Popen[bytes], checkpoint: WatchedCheckpoint) -> tuple[int, Sequence[str]]:
        """Its exit status and last lines. LeaseLostError if it had to be ended, since the checkpoint may be gone."""
        lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        assert process.stderr is not None
        pump = threading.Thread(target=_pump, args=(process.stderr, lines), daemon=True)
        pump.start()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
                    break
                checkpoint.check()
        except BaseException:
            _end(process)
            raise
        finally:
            with self._lock:
                self._process = None
            pump.join(KILL_SECONDS)
        return process.returncode, list(lines)


def _pump(source: IO[bytes], lines: collections.deque[str]) -> None:
    """What it writes is passed on at once, also what has no end of line yet, such as a progress bar."""
    begun = b""
    with source:
        while chunk := os.read(source.fileno(), CHUNK_BYTES):
            with contextlib.suppress(OSError):
                os.write(2, chunk)
            *ended, begun = (begun + chunk).split(b"\n")
            lines.extend(_as_shown(line) for line in ended)
            begun = _last_written(begun)[-MOST_OF_A_LINE:]
    if begun:
        lines.append(_as_shown(begun))


def _last_written(line: bytes) -> bytes:
    """What a terminal shows of it: a carriage return begins it anew, unless it is the last that there is."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


def _as_shown(line: bytes) -> str:
    return _last_written(line).decode("utf-8", "replace").rstrip()


def _fitting(ended: str, lines: Sequence[str]) -> str:
    """How it has ended, and the last lines: as many as a group's record has room for, so that it need cut nothing."""
    kept: list[str] = []
    room = MAX_TEXT - len(ended)
    for line in reversed(lines):
        room -= len(line) + 1
        if room < 0:
            break
        kept.insert(0, line)
    if lines and not kept:
        kept = [lines[-1][len(ended) + 1 - MAX_TEXT :]]
    return "\n".join([ended, *kept])


def _end(process: subprocess.Popen[bytes]) -> None:
    _send(process, signal.SIGTERM)
    try:
        process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        _send(process, signal.SIGKILL)
        process.wait()


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _filled(word: str, path: str, number: int) -> str:
    """In one pass: a path may have ``{number}`` in it."""
    return _PLACES.sub(lambda place: path if place[0] == "{path}" else str(number), word)


def exported_within(seconds: float) -> Prepare:
    """``{path}`` is that of the checkpoint's export, which is waited for so long. CheckpointNotFoundError if none comes."""

    @contextlib.contextmanager
    def prepare(checkpoint: WatchedCheckpoint) -> Iterator[str]:
        deadline = time.monotonic() + seconds
        while not checkpoint.is_settled:  # as it is if this worker is stopped
            path = checkpoint.export_path()
            if path is not None:
                yield path
                return
            if time.monotonic() >= deadline:
                raise CheckpointNotFoundError(checkpoint.path, f"nothing was exported from it within {seconds:g} s")
            time.sleep(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
        yield ""

    return prepare


@contextlib.contextmanager
def as_it_is(checkpoint: WatchedCheckpoint) -> Iterator[str]:
    """The checkpoint's own path."""
    yield checkpoint.path
