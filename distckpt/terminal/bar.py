"""A bar that shows how far something has come, where there is a terminal to see it, and if it takes long enough."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distckpt.terminal.sizes import human_bytes

Update = Callable[[int, int], None]
"""Takes how many bytes are done, and how many there are."""

PATIENCE_SECONDS = 1.0
"""What is over sooner is not shown."""


@contextmanager
def bar(title: str, shown: bool = True, sized: bool = True) -> Iterator[Update]:
    """Inside, tell what is given how far it has come, from any thread. Without a terminal, or unless ``shown``, nobody
    sees it; it leaves nothing behind. What is not ``sized`` is not bytes."""
    if not shown or not sys.stderr.isatty():
        yield _nowhere
        return
    line = _Line(title, time.monotonic() + PATIENCE_SECONDS, sized)
    try:
        yield line.update
    finally:
        line.close()


@contextmanager
def pulse(title: str, shown: bool = True) -> Iterator[None]:
    """As ``bar``, for what cannot tell how far it has come."""
    with bar(title, shown) as update:
        update(0, 0)
        yield


def _nowhere(done: int, total: int) -> None:
    """Nobody looks."""


class _Line:
    """One bar among those that are shown."""

    def __init__(self, title: str, begin: float, sized: bool) -> None:
        self._title = title
        self._sized = sized
        self._begin = begin
        self._task: Any = None
        self._closed = False

    def update(self, done: int, total: int) -> None:
        """So far. A total of 0 is not known."""
        if self._closed or (time.monotonic() < self._begin and total):
            return
        if self._task is None:
            self._task = _screen.begin(self._title, total or None, self._sized)
        _screen.update(self._task, done)

    def close(self) -> None:
        """It is over."""
        self._closed = True
        if self._task is not None:
            _screen.end(self._task)


class _Screen:
    """All bars of the process, below each other. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Any = None
        self._shown = 0

    def begin(self, title: str, total: int | None, sized: bool) -> Any:
        with self._lock:
            if self._progress is None:
                self._progress = _new_progress()
                self._progress.start()
            self._shown += 1
            task = self._progress.add_task(title, total=total, sized=sized)
            self._progress.refresh()
            return task

    def update(self, task: Any, done: int) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.update(task, completed=done)

    def end(self, task: Any) -> None:
        with self._lock:
            self._progress.remove_task(task)
            self._shown -= 1
            if not self._shown:
                self._progress.stop()
                self._progress = None


_screen = _Screen()


def _sizes(done: float, total: float | None, rate: float | None) -> str:
    """``1.2 GiB of 3.4 GiB, 210 MiB/s``, as far as it is known."""
    if total is None and not done:
        return ""
    of = "" if total is None else f" of {human_bytes(int(total))}"
    return f"{human_bytes(int(done))}{of}" + (f", {human_bytes(int(rate))}/s" if rate else "")


def _new_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

    class Sizes(ProgressColumn):
        def render(self, task: Task) -> Any:
            if not task.fields["sized"]:
                return ""
            return _sizes(task.completed, task.total, task.finished_speed or task.speed)

    columns = (TextColumn("{task.description}"), BarColumn(), Sizes(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
