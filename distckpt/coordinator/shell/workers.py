"""Threads that do what may hang: a store that does not answer holds up neither closing nor the end of the interpreter."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")


class Workers:
    """So many daemon threads, which do jobs in the order in which they are given. They are there from the beginning.

    Not an executor of ``concurrent.futures``, whose threads the interpreter waits for when it ends.
    """

    def __init__(self, name: str, count: int) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{at}" if count > 1 else name, daemon=True)
            for at in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """Have ``job`` done. What it raises is its own affair, and is logged."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the threads once what was given to them is done. Returns at once."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the end of the threads, until this monotonic time at most."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # a thread that ended would leave everything undone that comes later
                logger.exception("%s", threading.current_thread().name)


def each(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> list[Made]:
    """What ``make`` makes of every item, in their order, so many at a time. Raises the first failure."""
    waiting = list(enumerate(items))[::-1]
    made: dict[int, Made] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            try:
                at, item = waiting.pop()
            except IndexError:
                return
            try:
                made[at] = make(item)
            except BaseException as error:  # noqa: BLE001 - carried over to the caller, who raises it
                failures.append(error)

    helpers = [threading.Thread(target=work, name="distckpt-each", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return [made[at] for at in range(len(made))]
