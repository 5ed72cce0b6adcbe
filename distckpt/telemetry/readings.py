"""What is told of a manager: the names, what they mean, and where each number comes from. Pure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distckpt.format.json.log import CheckpointRecord
from distckpt.rank.costs import ManagerStats

PREFIX = "distckpt"
LABELS = ("directory", "rank", "world_size", "host")

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}
"""By the last word of a name, as OpenTelemetry writes them."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A manager when it is asked, ``at`` epoch seconds, as its ``stats`` are then.

    ``newest`` is the checkpoint that was committed last, as far as the rank knows, and ``run`` the run's number in the
    log; None before there is one.
    """

    stats: ManagerStats
    newest: CheckpointRecord | None
    run: int | None
    at: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One number: a counter if it only ``grows``, else a gauge. ``of`` takes it from a moment, or None if it has none."""

    name: str
    about: str
    grows: bool
    of: Callable[[Moment], float | None]

    @property
    def unit(self) -> str:
        """In OpenTelemetry's words; '' for what is only counted."""
        return _UNITS.get(self.name.rpartition("_")[2], "")


_COUNTED = (
    ("saves", "saves", "saves begun"),
    ("saves_failed", "failed", "saves that have failed"),
    ("saves_committed", "committed.times", "saves that were committed"),
    ("rollbacks", "rollbacks", "restores that went back in the middle of a run"),
    ("written_bytes", "bytes_written", "bytes that this rank has written, of committed checkpoints"),
    ("committed_bytes", "bytes_committed", "bytes of committed checkpoints, of all ranks together"),
    ("restored_bytes", "bytes_restored", "bytes that this rank has read to restore"),
    ("managed_seconds", "seconds", "time since the manager was made"),
    ("starting_seconds", "starting_seconds", "what went by before the first restore, if that came before any save"),
    ("saving_seconds", "saving_seconds", "training stood still for saves"),
    ("lost_seconds", "lost_seconds", "training that was lost because a restore went back"),
)
"""Name, where it is in ManagerStats, and what it is."""

_TIMED = (
    ("first_stall", "training stood still for the first save"),
    ("stall", "training stood still for a save, the first one left out"),
    ("queued", "a save waited for the save before, which had the buffer"),
    ("copied", "a save copied the state"),
    ("written", "from a save's begin until this rank's part was on storage"),
    ("committed", "from a save's begin until this rank knew that it is committed"),
    ("waited", "training waited for saves to end"),
    ("device_waited", "a GPU's optimizer step waited for the copy"),
    ("restored", "training stood still for a restore"),
)
"""Fields of ManagerStats that are Durations, and what took so long."""


def _readings() -> Iterator[Reading]:
    for name, where, about in _COUNTED:
        yield Reading(name, about, True, _of_stats(where))
    for name, about in _TIMED:
        yield Reading(f"{name}_seconds", f"{about}: in all", True, _of_stats(f"{name}.total"))
        yield Reading(f"{name}_times", f"{about}: how often", True, _of_stats(f"{name}.times"))
        yield Reading(f"{name}_longest_seconds", f"{about}: the longest", False, _of_stats(f"{name}.longest"))
    yield Reading("unsaved_seconds", "training that would be lost if the process were killed now", False,
                  _of_stats("unsaved_seconds"))  # fmt: skip
    yield Reading("goodput_ratio", "productive time over all time since the manager was made", False,
                  _of_stats("goodput"))  # fmt: skip
    yield Reading("newest_checkpoint_number", "number of the newest committed checkpoint", False, _number)
    yield Reading("newest_checkpoint_age_seconds", "since it was committed, by the hosts' clocks", False, _age)
    yield Reading("run_number", "number of this run in the log", False, lambda moment: moment.run)


def _of_stats(where: str) -> Callable[[Moment], float]:
    take = operator.attrgetter(where)
    return lambda moment: float(take(moment.stats))


def _number(moment: Moment) -> float | None:
    return None if moment.newest is None else moment.newest.number


def _age(moment: Moment) -> float | None:
    return None if moment.newest is None else max(0.0, moment.at - moment.newest.time)


READINGS = tuple(_readings())
