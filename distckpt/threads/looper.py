"""LooperThread: calls a function again and again until its Coordinator stops."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distckpt.threads.coordinator import Coordinator


class LooperThread(threading.Thread):
    """A daemon thread that runs code again and again until its Coordinator stops, on a timer or back to back.

    The code is ``target``, called with ``args`` and ``kwargs``, or an overridden ``run_loop``. With
    ``timer_interval_secs`` it runs at once and then at start + k times the interval, whatever a run takes: the times
    do not drift, and those that were missed are made up for back to back, or left out with ``skip_missed`` (what
    heartbeats want). With None it runs back to back. A request to stop ends the waiting at once; a run that is under
    way is never interrupted. What the code raises is reported to the Coordinator and ends the thread.

    The thread registers itself with ``coord``. Time is monotonic (in TensorFlow a clock that is set shifts the times);
    a looper with neither target nor ``run_loop`` waits for the stop (TensorFlow's spins).

    Raises ValueError if ``coord`` is not a Coordinator, or for ``args`` or ``kwargs`` without ``target``.
    """

    def __init__(
        self,
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object] | None = None,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        skip_missed: bool = False,
    ) -> None:
        if not isinstance(coord, Coordinator):
            raise ValueError(f"coord must be a Coordinator, not {coord!r}")  # noqa: TRY004 - as in TensorFlow
        if target is None and (args or kwargs):
            raise ValueError("args and kwargs are for a target, and none was given")
        super().__init__(name=name, daemon=True)
        self._coord = coord
        self._interval = timer_interval_secs
        self._call = functools.partial(target, *(args or ()), **(kwargs or {})) if target is not None else None
        self._skip_missed = skip_missed
        coord.register_thread(self)

    @staticmethod
    def loop(
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        skip_missed: bool = False,
    ) -> LooperThread:
        """Make a LooperThread that calls ``target``, start it and return it."""
        looper = LooperThread(coord, timer_interval_secs, target, args, kwargs, name=name, skip_missed=skip_missed)
        looper.start()
        return looper

    def run(self) -> None:
        """``start_loop``, then ``run_loop`` until there is a stop, then ``stop_loop``.

        The first and the last are called even if the stop came before the thread; ``stop_loop`` is not if one of the
        others raises.
        """
        with self._coord.stop_on_exception():
            self.start_loop()
            if self._interval is None:
                while not self._coord.should_stop():
                    self.run_loop()
            else:
                self._run_on_time(self._interval)
            self.stop_loop()

    def isAlive(self) -> bool:  # as TensorFlow's pages have it
        """The name that ``is_alive`` had in older versions of Python."""
        return self.is_alive()

    def start_loop(self) -> None:
        """Called when the thread starts."""

    def run_loop(self) -> None:
        """Called at the times of the interval. Calls the target."""
        if self._call is not None:
            self._call()
        elif self._interval is None:
            self._coord.wait_for_stop()

    def stop_loop(self) -> None:
        """Called when the thread stops, unless by an error."""

    def _run_on_time(self, interval: float) -> None:
        due = time.monotonic()
        while not self._coord.wait_for_stop(due - time.monotonic()):
            due += interval
            self.run_loop()
            late = time.monotonic() - due
            if self._skip_missed and interval > 0 and late > 0:
                due += interval * math.ceil(late / interval)
