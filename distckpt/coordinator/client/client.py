"""One rank of one run as a client of the coordinator, whichever is in charge."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from distckpt.coordinator.client.line import Line
from distckpt.coordinator.messages import FromRank, Leave, OpenRun, RankRequest, Refused, Reply, RunOpened, Unknown
from distckpt.errors import CoordinatorUnavailableError, DistckptError, FencedError

OPEN_SECONDS = 60.0
"""How long a coordinator has at least to answer the first question: it may be starting, or restarting."""


class Client:
    """Asks on behalf of one rank of one run. Opens the run again whenever the coordinator has been replaced.

    ``connect`` finds or starts the coordinator, and may take long; ``opened`` is called once the run is open, and
    what it raises keeps it from being used. Somebody calls ``connect``, in whichever thread; all others wait for it.
    """

    def __init__(
        self, connect: Callable[[], Line], opening: OpenRun, opened: Callable[[RunOpened], None] = lambda run: None
    ) -> None:
        self._connect = connect
        self._opening = opening
        self._check = opened
        self._lock = threading.Lock()
        self._first: Future[tuple[Line, RunOpened]] = Future()
        self._opened: RunOpened | None = None

    def connect(self) -> None:
        """Find the coordinator and report to it. Raises nothing: ``open`` does."""
        try:
            line = self._connect()
            try:
                opened = self._first_open(line)
                self._check(opened)
            except BaseException:
                line.close()  # or it would go on claiming the directory that its maker has given up
                raise
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            self._first.set_exception(error)
        else:
            self._first.set_result((line, opened))

    def check(self) -> None:
        """Raises what keeps the run from being opened, if that is known already."""
        if self._first.done():
            self.open()

    @property
    def opened(self) -> RunOpened | None:
        """The run, if it is open by now."""
        is_open = self._first.done() and self._first.exception() is None
        return self._line_and_run(None)[1] if is_open else None

    def open(self, timeout: float | None = None) -> RunOpened:
        """The opened run. Raises what the coordinator refuses with: StaleRunError, FencedError, StorageError ..."""
        return self._opened or self._line_and_run(timeout)[1]

    def ask(self, request: RankRequest, timeout: float) -> Reply:
        """Ask as this rank of this run; an Unknown answer, after the run was opened again, is left to the caller.

        To open it again may take longer than ``timeout``; who just leaves does not. Raises the error of a Refused
        answer, and CoordinatorUnavailableError.
        """
        line, opened = self._line_and_run(None)
        reply = line.ask(FromRank(opened.run, self._opening.rank, request), timeout)
        if isinstance(reply, Unknown) and request != Leave():
            with self._lock:
                if self._line_and_run(None)[1] is opened:  # else another thread has opened the run again meanwhile
                    self._opened = self._open(line, opened)
        return raised(reply)

    def close(self) -> None:
        """Hang up. What was asked and not yet answered stays unanswered."""
        if self._first.done() and self._first.exception() is None:
            self._first.result()[0].close()

    def _line_and_run(self, timeout: float | None) -> tuple[Line, RunOpened]:
        try:
            line, first = self._first.result(timeout)
        except FutureTimeoutError:
            if self._first.done():
                raise
            raise CoordinatorUnavailableError(f"the run was not open within {timeout:g} s") from None
        except DistckptError as error:
            raise _copy(error) from None
        return line, self._opened or first

    def _first_open(self, line: Line) -> RunOpened:
        try:
            return self._open(line)
        except FencedError:
            # It served a run that another cluster took over from; ours is newer than both.
            line.replace()
            return self._open(line)

    def _open(self, line: Line, before: RunOpened | None = None) -> RunOpened:
        opening = self._opening
        if before is not None:
            opening = dataclasses.replace(opening, run=before.run, origin=before.origin)
        reply = raised(line.ask(opening, max(OPEN_SECONDS, self._opening.save_timeout)))
        if not isinstance(reply, RunOpened):
            raise CoordinatorUnavailableError(f"unexpected answer to OpenRun: {reply!r}")
        return reply


def raised(reply: Reply) -> Reply:
    """The reply, unless it is a Refused one: then its error is raised."""
    if isinstance(reply, Refused):
        raise _copy(reply.error)
    return reply


def _copy(error: DistckptError) -> DistckptError:
    # Several futures may hold the same instance; raising it twice would knot their tracebacks together.
    return copy.copy(error)
