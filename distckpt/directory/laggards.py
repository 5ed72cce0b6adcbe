"""Which ranks the others wait for: whose shards were the last to land. Pure: arithmetic on what runs have told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.format.json.stats import Durations, RunStats


@dataclass(frozen=True, slots=True)
class Laggard:
    """A ``rank`` whose shards landed last so many times; ``lag`` is how long after those of the first."""

    rank: int
    lag: Durations


@dataclass(frozen=True, slots=True)
class Laggards:
    """Those of one ``run``, who cost most first."""

    run: int
    ranks: tuple[Laggard, ...]

    @property
    def saves(self) -> int:
        """How many saves of the run they are of."""
        return sum(one.lag.times for one in self.ranks)


def laggards_of(runs: Sequence[RunStats]) -> Laggards | None:
    """Of the newest run of several ranks that has told of any; None if there is none."""
    for run in reversed(runs):
        lags: dict[int, Durations] = {}
        for took in run.recent:
            if took.last is not None:
                lags[took.last] = lags.get(took.last, Durations()).with_one(took.lag)
        if lags and run.world_size > 1:
            ranks = sorted((Laggard(rank, lag) for rank, lag in lags.items()), key=lambda one: -one.lag.total)
            return Laggards(run.run, tuple(ranks))
    return None
