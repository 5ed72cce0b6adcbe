"""What one run of a job has measured of its own checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import MAX_BYTES, MAX_NUMBER, MAX_WORLD

FORMAT = 1
MAX_STATS_BYTES = 64 << 10
MAX_TEXT_LENGTH = 256
MAX_SECONDS = 1e10
"""Three hundred years."""

MAX_TIME = 253402300799.0
"""The last second of the year 9999."""

MOST_RECENT = 256
"""Committed saves of a run that it has each for itself, the newest."""

End = Literal["", "closed", "failed"]


class Durations(NamedTuple):
    """How long something took, of so many ``times`` that it was done: in ``total``, and the ``longest``, in seconds."""

    times: int = 0
    total: float = 0.0
    longest: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds each; 0 if it was never done."""
        return self.total / self.times if self.times else 0.0

    def with_one(self, seconds: float) -> Durations:
        """These and one more."""
        return Durations(self.times + 1, self.total + seconds, max(self.longest, seconds))

    def joined(self, other: Durations) -> Durations:
        """Both together."""
        return Durations(self.times + other.times, self.total + other.total, max(self.longest, other.longest))


class SaveTook(NamedTuple):
    """The committed save of a ``number``, begun when the run had gone on for ``at`` seconds, as rank 0 saw it.

    Training stood still for ``stall`` seconds, and it was ``committed`` so many after its begin. The shards of the rank
    ``last`` landed last, ``lag`` seconds after those of the first; None and 0 where rank 0 was not told.
    """

    number: int
    at: float
    stall: float
    committed: float
    last: int | None = None
    lag: float = 0.0


class RunStats(Sealed, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The run with this number in the log of this ``origin``, as its rank 0 on ``host`` saw it.

    It ``began`` at that time (epoch seconds, only to be shown) and had gone on for ``seconds`` when this was written, by the
    monotonic clock of its process, as all durations are. ``end`` is "" until it ends: "closed" in good order, or "failed",
    by an exception. One that says "" and has a successor crashed, at most ``next_within`` seconds later.
    The rest is as in ``ManagerStats``.
    """

    MAX_BYTES: ClassVar[int] = MAX_STATS_BYTES

    format: int
    run: int
    origin: str
    host: str
    world_size: int
    began: float
    next_within: float
    end: End
    seconds: float
    saves: int
    failed: int
    rollbacks: int
    bytes_written: int
    bytes_committed: int
    bytes_restored: int
    starting_seconds: float
    saving_seconds: float
    lost_seconds: float
    unsaved_seconds: float
    first_stall: Durations
    stall: Durations
    queued: Durations
    copied: Durations
    written: Durations
    committed: Durations
    waited: Durations
    device_waited: Durations
    between: Durations
    restored: Durations
    recent: tuple[SaveTook, ...] = ()

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        values = [getattr(self, name) for name in self.__struct_fields__ if name not in ("began", "recent")]
        numbers = [each for value in values for each in (value if isinstance(value, Durations) else (value,))]
        numbers += (each for took in self.recent for each in took if each is not None)
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        if not (1 <= self.run <= MAX_NUMBER and 1 <= self.world_size <= MAX_WORLD):
            yield "its run or world size is out of bounds"
        if len(self.recent) > MOST_RECENT or any((took.last or 0) >= self.world_size for took in self.recent):
            yield "its recent saves are too many, or of ranks that it does not have"
        if max(len(self.origin), len(self.host)) > MAX_TEXT_LENGTH:
            yield "its origin or host is too long"
        if not all(0 <= number <= MAX_BYTES for number in numbers if isinstance(number, int)):
            yield "a count in it is out of bounds"
        if not all(0 <= number <= MAX_SECONDS for number in numbers if isinstance(number, float)):
            yield "a duration in it is out of bounds"
        if not abs(self.began) <= MAX_TIME:
            yield "its beginning is not a time"
