"""What a thread does for a rank, it does to the end: a call from inside another one would wait for itself."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from distckpt.errors import CoordinatorError
from distckpt.rank.costs import Costs

OF_ONE_THREAD = frozenset({"prepare", "save", "restore"})
"""Calls that read or fill the objects and meet other ranks in an order: of two threads, one would wait for the other."""


class Alone:
    """Refuses a call that a signal handler or a hook makes while the same thread is inside another one.

    And one of OF_ONE_THREAD, while another thread is inside of one. ``costs`` are told of each, for training stands still
    meanwhile.
    """

    def __init__(self, directory: str, costs: Costs) -> None:
        self._directory = directory
        self._costs = costs
        self._inside: dict[int, tuple[str, FrameType | None]] = {}

    def __call__(self, what: str) -> _Call:
        """For the time of one call. CoordinatorError, at once, if another call that it must not meet is running."""
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
        if _runs(frame, caller):
            self._refuse(outer, "the same thread, from a signal handler or a hook, say")
        self._inside[thread] = self._what, caller  # before it looks for others: of two that look at once, both see one
        if self._what in OF_ONE_THREAD:
            for other, (what, frame) in self._inside.copy().items():
                if other != thread and what in OF_ONE_THREAD and _runs(frame, sys._current_frames().get(other)):
                    del self._inside[thread]
                    self._refuse(what, "another thread")
        self._costs.entered(self._what)

    def _refuse(self, other: str, where: str) -> NoReturn:
        raise CoordinatorError(
            f"{self._directory}: {self._what} was called while {other} was running in {where}. Nothing was done, and "
            f"{other} goes on: call {self._what} after it has returned"
        )

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


def _runs(frame: FrameType | None, newest: FrameType | None) -> bool:
    """Whether the thread whose ``newest`` frame this is has not left ``frame`` yet."""
    return frame is not None and any(running is frame for running in _stack(newest))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
