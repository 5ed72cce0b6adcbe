"""One rank of one run as a client of the coordinator, whichever is in charge."""

from __future__ import annotations

import copy
import dataclasses
import threading

from distckpt.coordinator.client.line import Line
from distckpt.coordinator.messages import FromRank, Leave, OpenRun, RankRequest, Refused, Reply, RunOpened, Unknown
from distckpt.errors import CoordinatorUnavailableError, DistckptError

OPEN_SECONDS = 60.0
"""How long a coordinator has at least to answer the first question: it may be starting, or restarting."""


class Client:
    """Asks on behalf of one rank of one run. Opens the run again whenever the coordinator has been replaced."""

    def __init__(self, line: Line, opening: OpenRun) -> None:
        self._line = line
        self._opening = opening
        self._lock = threading.Lock()
        self._opened: RunOpened | None = None

    def open(self) -> RunOpened:
        """Report to the coordinator. Raises what it refuses with: StaleRunError, FencedError, StorageError ..."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open(0)
            return self._opened

    def ask(self, request: RankRequest, timeout: float) -> Reply:
        """Ask as this rank of this run; an Unknown answer, after the run was opened again, is left to the caller.

        To open it again may take longer than ``timeout``; who only leaves does not. Raises the error of a Refused
        answer, and CoordinatorUnavailableError.
        """
        opened = self.open()
        reply = self._line.ask(FromRank(opened.run, self._opening.rank, request), timeout)
        if isinstance(reply, Unknown) and not isinstance(request, Leave):
            with self._lock:
                if self._opened is opened:  # else another thread has opened the run again meanwhile
                    self._opened = self._open(opened.run)
        return _raised(reply)

    def close(self) -> None:
        """Hang up. What was asked and not yet answered stays unanswered."""
        self._line.close()

    def _open(self, run: int) -> RunOpened:
        opening = dataclasses.replace(self._opening, run=run)
        reply = _raised(self._line.ask(opening, max(OPEN_SECONDS, self._opening.save_timeout)))
        if not isinstance(reply, RunOpened):
            raise CoordinatorUnavailableError(f"unexpected answer to OpenRun: {reply!r}")
        return reply


def _raised(reply: Reply) -> Reply:
    if isinstance(reply, Refused):
        raise _copy(reply.error)
    return reply


def _copy(error: DistckptError) -> DistckptError:
    # Several futures may hold the same instance; raising it twice would knot their tracebacks together.
    return copy.copy(error)
