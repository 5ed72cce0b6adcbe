"""Simulated time, chance and faults: everything that happens in a simulation follows from its seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from distckpt.format.json.paging import Sizes
from distckpt.testing.history import History
from distckpt.testing.sim_store import SimulatedStore

DAY = 86400.0
LATEST = 40.0
"""So many seconds after a request was given up it may still be done."""


@dataclass(slots=True)
class Faults:
    """How likely things go wrong, each as a probability for one occasion."""

    slow: float = 0.0
    lost_message: float = 0.0
    doubled_message: float = 0.0
    stale_address: float = 0.0
    lost_acknowledgement: float = 0.0
    late_write: float = 0.0
    failed_write: float = 0.0
    repeated_write: float = 0.0
    late_repeat: float = 0.0
    refused_commit: float = 0.0
    failed_seal: float = 0.0
    full_disk: float = 0.0
    failed_rank: float = 0.0
    missed_save: float = 0.0
    lone_restore: float = 0.0
    failed_read: float = 0.0
    failed_page: float = 0.0
    failed_look: float = 0.0
    clock_jump: float = 0.0
    frozen_reader: float = 0.0
    freeze_at_append: float = 0.0
    rejected: float = 0.0
    released: float = 0.0

    def heal(self) -> None:
        """From now on nothing goes wrong any more."""
        for name in self.__slots__:
            setattr(self, name, 0.0)


class SimulatedWorld:
    """The scheduler, and what everybody in a simulation shares."""

    def __init__(self, seed: int, faults: Faults, unsafe: frozenset[str] = frozenset()) -> None:
        self.random = random.Random(seed)
        self.history = History(seed)
        self.store = SimulatedStore(self.history, exclusive="overwrite" not in unsafe)
        self.faults = faults
        self.sizes = Sizes(self.random.randint(1, 2), 2, self.random.choice([4, 8]), 2)
        self.unsafe = unsafe
        self.time = 0.0
        self.about_to_append: Callable[[object], None] = lambda _: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def unique(self) -> int:
        """A number that nobody else gets."""
        self._count += 1
        return self._count

    def later(self, delay: float, step: Callable[[], None]) -> None:
        """Do ``step`` after ``delay`` simulated seconds."""
        heapq.heappush(self._queue, (self.time + delay, self.unique(), step))

    def latency(self) -> float:
        """How long one operation on the store or one message takes, in seconds; sometimes very long."""
        slow = self.random.random() < self.faults.slow
        return self.random.uniform(1.0, 6.0) if slow else self.random.expovariate(20.0)

    def again(self, write: Callable[[], None]) -> None:
        """Perhaps do ``write`` once more, a while from now: a try that was given up, and comes after all."""
        if self.random.random() < self.faults.late_repeat:
            self.later(self.random.uniform(0.0, LATEST), write)

    def pick(self, **chances: float) -> str:
        """One of the names with its probability, else ''."""
        roll = self.random.random()
        for name, chance in chances.items():
            if roll < chance:
                return name
            roll -= chance
        return ""

    def run(self, until: float) -> None:
        """Let simulated time pass."""
        while self._queue and self._queue[0][0] <= until:
            self.time, _, step = heapq.heappop(self._queue)
            step()
        self.time = max(self.time, until)


class Clocks:
    """Those of one process. The wall clock lies and may step, by a day; the monotonic one runs a little fast or slow."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._skew = self._wrong(40.0)
        self._began = world.random.uniform(0.0, 1e6)
        self._rate = world.random.uniform(0.96, 1.04)

    def wall(self) -> float:
        """What it takes for the time."""
        if self._world.random.random() < self._world.faults.clock_jump:
            self._skew += self._wrong(30.0)
        return 1e6 + self._world.time + self._skew

    def elapsed(self) -> float:
        """Seconds since some moment of its own."""
        return self._began + self._rate * self._world.time

    def until(self, elapsed: float) -> float:
        """In how many simulated seconds ``elapsed`` will say that."""
        return max(0.0, elapsed - self.elapsed()) / self._rate

    def _wrong(self, mostly: float) -> float:
        random = self._world.random
        most = DAY if random.random() < 0.3 else mostly
        return random.uniform(-most, most)
