"""A run as a picture shows it: what it was told by the log, by reports and by what its runs have measured of themselves."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.directory.goodput import History
from distckpt.directory.reports import read_reports
from distckpt.directory.stats import read_stats
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.report import with_reports
from distckpt.format.json.stats import RunStats
from distckpt.storage import Store


@dataclass(frozen=True, slots=True)
class Crash:
    """The end of a run that came to no good one, at a ``time`` of its host; ``after`` the checkpoint of that number, if any."""

    run: int
    time: float
    after: int | None


@dataclass(frozen=True, slots=True)
class Picture:
    """``checkpoints`` in the order of their commits, as far as they are still there, with all their metrics."""

    directory: str
    history: History
    checkpoints: tuple[CheckpointRecord, ...]
    passed_over: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """What was reported, as pairs of a checkpoint's number and the value, by the name of the metric."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in self.checkpoints:
            for name, value in record.metrics.items():
                found.setdefault(name, []).append((record.number, value))
        return {name: sorted(found[name]) for name in sorted(found)}

    @property
    def crashes(self) -> list[Crash]:
        """All that are known of."""
        return [self._crash(run) for run in self.history.runs if self.history.failed(run)]

    @property
    def resizes(self) -> list[tuple[int, int, int]]:
        """At which checkpoint's number it was another world size, and from which to which."""
        pairs = zip(self.checkpoints, self.checkpoints[1:], strict=False)
        return [(to.number, at.world_size, to.world_size) for at, to in pairs if at.world_size != to.world_size]

    def _crash(self, run: RunStats) -> Crash:
        end = run.began + run.seconds
        before = [record.number for record in self.checkpoints if record.time <= end]
        return Crash(run.run, end, before[-1] if before else None)


def picture_of(store: Store) -> Picture:
    """What there is to show of a directory. CheckpointNotFoundError if there is nothing, and what ``read_run`` raises."""
    reports = [one.report for one in read_reports(store).found]  # before the log, into which they go
    state, lost = read_run(store).readable()
    told = read_stats(store)
    records = tuple(reversed(with_reports(state, reports).newest_first()))
    if not records and not told.history.runs:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here, and no run has told of itself")
    return Picture(store.url, told.history, records, (*told.passed_over, *(str(one.error) for one in lost)))
