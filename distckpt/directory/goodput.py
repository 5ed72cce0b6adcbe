"""What saving and failures have cost a job, and how often it had better save. Pure: arithmetic on what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise

from distckpt.format.json.stats import Durations, RunStats

CONFIDENCE = 0.9
"""How sure one may be that the time between failures lies within its bounds, if failures come by chance."""

FEWEST_FAILURES = 3
"""With fewer, bounds are all that is said: the estimate itself could be wrong by an order of magnitude."""

MANY = 100
"""Failures above which exact bounds would take long to find, and are not needed: the others are wrong by less than 0.01 %."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the time went between the first start of a job and its last sign of life, in seconds that sum up to ``wall``.

    ``productive`` is training that a later checkpoint, or a close in good order, has kept; in a run that still goes on
    all of it. ``saving`` is what training stood still for saves, and waited for them, on rank 0; ``restoring`` and
    ``starting``, until a run's first restore, speak for themselves. ``lost`` was trained and is gone: from the begin of
    the last save that was committed to the last sign of life of a run that came to no good end, or until a restore that
    went back to it. ``down`` is from there to the next start, and ``paused`` the same after a close in good order.

    All are durations by the monotonic clock of one process, but for ``down`` and ``paused``: those are differences of
    times of day, of two hosts perhaps, and 0 where a clock went back.
    """

    productive: float = 0.0
    saving: float = 0.0
    restoring: float = 0.0
    starting: float = 0.0
    lost: float = 0.0
    down: float = 0.0
    paused: float = 0.0

    @property
    def wall(self) -> float:
        """All of it."""
        return sum((self.productive, self.saving, self.restoring, self.starting, self.lost, self.down, self.paused))

    @property
    def fraction(self) -> float:
        """The goodput: productive time over wall time, from 0 to 1; 1 if no time has passed."""
        return min(1.0, self.productive / self.wall) if self.wall > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Failures:
    """How many there were in so many ``seconds`` of running."""

    count: int
    seconds: float

    @property
    def mean_time_between(self) -> float | None:
        """Seconds from one to the next; None if there was none."""
        return self.seconds / self.count if self.count else None

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which seconds the true mean time between failures lies, with CONFIDENCE; the upper is infinite for none.

        The exact bounds for a Poisson process (Garwood, Biometrika 28, 1936): those rates at which so many failures or
        more, or so many or fewer, would be as improbable as half of what is left of CONFIDENCE. With none seen in T
        seconds the lower bound is T/3. Above MANY they are approximated.
        """
        tail = (1 - CONFIDENCE) / 2
        if self.count > MANY:
            least, most = _byar(self.count, tail)
            return self.seconds / most, self.seconds / least
        most = _expected(lambda mean: _at_most(self.count, mean) > tail, self.count)
        if not self.count:
            return self.seconds / most, math.inf
        least = _expected(lambda mean: 1 - _at_most(self.count - 1, mean) < tail, self.count)
        return self.seconds / most, self.seconds / least


@dataclass(frozen=True, slots=True)
class Interval:
    """Seconds of training from one save to the next that lose least time altogether, and what they were computed from.

    A save costs ``cost`` seconds of training, and is committed after ``latency``, more often than which it cannot be done.
    With too few failures ``best`` is None: then it is at least ``least``, and at most ``most`` (infinite if none was seen).
    """

    cost: float
    latency: float
    failures: Failures
    best: float | None
    least: float
    most: float


def young(cost: float, between_failures: float) -> float:
    """Seconds of computing between two checkpoints that lose least time, to first order: sqrt(2 * cost * M).

    ``cost`` is what one checkpoint costs and M the mean time ``between_failures``, all in seconds. J. W. Young, A first
    order approximation to the optimum checkpoint interval, Communications of the ACM 17(9), 1974, pages 530-531.
    """
    return math.sqrt(2 * cost) * math.sqrt(between_failures)


def daly(cost: float, between_failures: float) -> float:
    """The same to a higher order: ``sqrt(2 d M) * (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d`` if d < 2 M, else M.

    d is the ``cost`` and M the mean time ``between_failures``. J. T. Daly, A higher order estimate of the optimum
    checkpoint interval for restart dumps, Future Generation Computer Systems 22(3), 2006, pages 303-312, equation 37.

    What saving in the background takes beyond ``cost`` makes a checkpoint late, and has little influence on the interval:
    N. H. Vaidya, Impact of checkpoint latency on overhead ratio of a checkpointing scheme, IEEE Transactions on
    Computers 46(8), 1997, pages 942-947.
    """
    if math.isinf(between_failures):
        return math.inf
    if cost >= 2 * between_failures:
        return between_failures
    ratio = cost / (2 * between_failures)
    return young(cost, between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def suggested(cost: float, latency: float, failures: Failures) -> Interval:
    """How often to save, by Daly's formula for the failures that were seen, and for the bounds of their rate."""
    least, most = (max(latency, daly(cost, between)) for between in failures.bounds)
    mean = failures.mean_time_between
    known = mean is not None and failures.count >= FEWEST_FAILURES
    best = max(latency, daly(cost, mean)) if known and mean is not None else None
    return Interval(cost, latency, failures, best, least, most)


@dataclass(frozen=True)
class History:
    """The ``runs`` of one directory, by number, as far as they have told of themselves. ``newest`` is the log's newest run.

    Runs between them that have left no word failed, or could not write; those before the first are not counted.
    """

    runs: tuple[RunStats, ...]
    newest: int = 0

    @property
    def silent(self) -> int:
        """How many runs between those known have left no word of themselves."""
        numbers = {run.run for run in self.runs}
        return max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0

    def failed(self, run: RunStats) -> bool:
        """Whether it came to no good end. One that says nothing of its end has crashed if there is a later one."""
        return run.end == "failed" or (not run.end and run.run < max(self.newest, self.runs[-1].run))

    def state(self, run: RunStats) -> str:
        """How it has ended: closed, failed, crashed; or open, if it goes on, or was not followed by another yet."""
        return run.end or ("crashed" if self.failed(run) else "open")

    def lost(self, run: RunStats) -> float:
        """Seconds of training of this run that are gone."""
        return run.lost_seconds + (run.unsaved_seconds if self.failed(run) else 0.0)

    @cached_property
    def failures(self) -> Failures:
        """Ends that were not good ones, runs without a word, and restores that went back in the middle of a run."""
        ends = sum(map(self.failed, self.runs))
        rollbacks = sum(run.rollbacks for run in self.runs)
        return Failures(ends + rollbacks + self.silent, sum(run.seconds for run in self.runs))

    @cached_property
    def goodput(self) -> Goodput:
        """Where the time went."""
        parts = dict.fromkeys(Goodput.__dataclass_fields__, 0.0)
        for run in self.runs:
            for name, seconds in self._parts(run).items():
                parts[name] += seconds
        for run, following in pairwise(self.runs):
            gap = max(0.0, following.began - (run.began + run.seconds))
            orderly = run.end == "closed" and following.run == run.run + 1
            parts["paused" if orderly else "down"] += gap
        return Goodput(**parts)

    def _parts(self, run: RunStats) -> dict[str, float]:
        """Of one run. However little sense its numbers make, they sum up to its seconds."""
        left, parts = run.seconds, {}
        spent = {
            "saving": run.saving_seconds + run.device_waited.total,
            "restoring": run.restored.total,
            "starting": run.starting_seconds,
            "lost": self.lost(run),
        }
        for name, seconds in spent.items():
            parts[name] = min(left, seconds)
            left -= parts[name]
        return {**parts, "productive": left}

    def all(self, pick: Callable[[RunStats], Durations]) -> Durations:
        """Some durations of all runs together."""
        return reduce(Durations.joined, map(pick, self.runs), Durations())

    @property
    def cost(self) -> float | None:
        """Seconds that one save costs the training: what it stands still, waits for the save before, and for it to end.

        The first save of a run, which plans and touches memory, counts only if there are no others. None without any.
        """
        first, later = self.all(lambda run: run.first_stall), self.all(lambda run: run.stall)
        if not (saves := first.times + later.times):
            return None
        waited = self.all(lambda run: run.waited).total + self.all(lambda run: run.device_waited).total
        return (later if later.times else first).mean + waited / saves

    @cached_property
    def interval(self) -> Interval | None:
        """How often to save; None while no save has been measured."""
        cost, latency = self.cost, self.all(lambda run: run.committed)
        if cost is None or not latency.times:
            return None
        return suggested(cost, latency.mean, self.failures)


def _at_most(count: int, mean: float) -> float:
    """How probable it is that so many or fewer come, where ``mean`` are expected."""
    if mean == 0:
        return 1.0
    terms = (math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1))
    return min(1.0, math.fsum(terms))


def _byar(count: int, tail: float) -> tuple[float, float]:
    """Between which numbers lies what is to be expected where so many came, each end wrong with the probability ``tail``.

    Byar's approximation to the exact bounds: N. E. Breslow and N. E. Day, Statistical methods in cancer research, volume
    II, 1987, chapter 2.
    """
    far = statistics.NormalDist().inv_cdf(1 - tail)
    more = count + 1
    return (
        count * (1 - 1 / (9 * count) - far / (3 * math.sqrt(count))) ** 3,
        more * (1 - 1 / (9 * more) + far / (3 * math.sqrt(more))) ** 3,
    )


def _expected(too_few: Callable[[float], bool], count: int) -> float:
    """The number to be expected up to which ``too_few`` holds; found by halving."""
    low, high = 0.0, 2.0 * count + 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if too_few(middle) else (low, middle)
    return high
