"""What a thread does for a rank, it does to the end: a call from inside another one would wait for itself."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from distckpt.errors import CoordinatorError
from distckpt.rank.costs import Costs


class Alone:
    """Refuses a call that a signal handler or a hook makes while the same thread is inside another one.

    ``costs`` are told of each, for training stands still meanwhile.
    """

    def __init__(self, directory: str, costs: Costs) -> None:
        self._directory = directory
        self._costs = costs
        self._inside: dict[int, tuple[str, FrameType | None]] = {}

    def __call__(self, what: str) -> _Call:
        """For the time of one call. CoordinatorError, at once, if this thread is inside another call already."""
        return _Call(self._directory, self._costs, self._inside, what)


class _Call:
    """One call by name, as a context. Which one a thread is inside is known by name and frame."""

    def __init__(
        self, directory: str, costs: Costs, inside: dict[int, tuple[str, FrameType | None]], what: str
    ) -> None:
        self._directory = directory
        self._costs = costs
        self._inside = inside
        self._what = what

    def __enter__(self) -> None:
        thread, caller = threading.get_ident(), _caller()
        outer, frame = self._inside.get(thread, ("", None))
        # What was interrupted just when it ended may still stand there, but it is not running any more.
        if frame is not None and any(running is frame for running in _stack(caller)):
            raise CoordinatorError(
                f"{self._directory}: {self._what} was called while {outer} was running in the same thread, from a signal "
                f"handler or a hook, say. Nothing was done, and {outer} goes on: call {self._what} after it has returned"
            )
        self._inside[thread] = self._what, caller
        self._costs.entered(self._what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._costs.left()
        self._inside.pop(threading.get_ident(), None)


def _caller() -> FrameType | None:
    """The frame whose with-statement it is."""
    frame = inspect.currentframe()
    enter = frame.f_back if frame is not None else None
    return enter.f_back if enter is not None else None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
