"""What an evaluation found out about one attempt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import shown
from distckpt.format.names import is_attempt

FORMAT = 1
MAX_REPORT_BYTES = 64 << 10
MAX_METRICS = 64
"""How many metrics a checkpoint may have: each log entry carries those of every checkpoint."""

MAX_METRIC_NAME = 128


class Report(Sealed, frozen=True, forbid_unknown_fields=True):
    """Metrics of ``attempt``, reported at ``time`` (epoch seconds) by ``reporter``, both for people."""

    MAX_BYTES: ClassVar[int] = MAX_REPORT_BYTES

    format: int
    attempt: str
    metrics: dict[str, float]
    time: float
    reporter: str = ""

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        if not is_attempt(self.attempt):
            yield f"{shown(self.attempt)} is not an attempt id"
        if not 1 <= len(self.metrics) <= MAX_METRICS:
            yield f"it has {len(self.metrics)} metrics, and 1 to {MAX_METRICS} are allowed"
        for name in self.metrics:
            if not is_metric(name):
                yield f"{shown(name)} is not the name of a metric: 1 to {MAX_METRIC_NAME} printable characters"
        if not all(map(math.isfinite, (self.time, *self.metrics.values()))):
            yield "its time or a metric is not a number"


@dataclass(frozen=True, slots=True)
class Reported:
    """A report, and the path of the object that it stands in."""

    path: str
    report: Report


def is_metric(name: str) -> bool:
    """Whether ``name`` can be that of a metric: ``eval/loss``, ``top-1 (val)``."""
    return 1 <= len(name) <= MAX_METRIC_NAME and name.isprintable()


def merged_metrics(known: Mapping[str, float], reports: Iterable[Report]) -> dict[str, float]:
    """What is known with what is reported; of one metric the last report counts. Beyond 64 metrics none is added."""
    merged = dict(known)
    for report in reports:
        merged.update(report.metrics)
    return dict(list(merged.items())[:MAX_METRICS])


def with_reports(state: State, reports: Iterable[Report]) -> State:
    """The state whose checkpoints have these metrics, too; the very same if they say nothing new."""
    of: dict[str, list[Report]] = {}
    for report in reports:
        of.setdefault(report.attempt, []).append(report)
    active, preserved = _reported_on(state.active, of), _reported_on(state.preserved, of)
    if active == state.active and preserved == state.preserved:
        return state
    return msgspec.structs.replace(state, active=active, preserved=preserved)


def _reported_on(
    records: tuple[CheckpointRecord, ...], reports: Mapping[str, list[Report]]
) -> tuple[CheckpointRecord, ...]:
    if not reports:
        return records
    return tuple(
        msgspec.structs.replace(record, metrics=merged_metrics(record.metrics, reports[record.attempt]))
        if record.attempt in reports
        else record
        for record in records
    )
