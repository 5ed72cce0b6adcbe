"""Rules that say which checkpoints stay, for ``CheckpointManager(..., keep=...)``. Pure: they look at records alone.

::

    keep=AnyOf(LatestN(3), BestN(3, metric="loss", mode="min", group="eval"), EveryHours(2))
    keep=LatestN(3) | BestN(3, metric="loss", mode="min", group="eval") | EveryHours(2)

A rule is asked anew each time, about all checkpoints that take part in retention. Whatever rules say, the newest stays,
and what is pinned, read, restored or held for a group of readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.report import is_metric
from distckpt.format.names import is_name


@dataclass(frozen=True, slots=True)
class Pending:
    """Which evaluations are still to come, as far as it was known after so many ``commits`` of the log.

    ``groups`` has the attempts that each group of readers still wants. What came later, and what a group would say that is
    not there yet, is pending too.
    """

    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    commits: int = 0

    def awaits(self, group: str, record: CheckpointRecord) -> bool:
        """Whether ``group`` may still say something about it."""
        wanted = self.groups.get(group)
        return wanted is None or record.attempt in wanted or record.order > self.commits


NOTHING_PENDING = Pending()


class Rule:
    """Says which checkpoints stay. Joined by ``|``: each keeps its own."""

    __slots__ = ()

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """The attempts that stay, of ``records`` in the order in which they were saved, oldest first."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    @property
    def metrics(self) -> frozenset[str]:
        """The metrics that it judges by."""
        return frozenset()

    @property
    def groups(self) -> frozenset[str]:
        """The groups of readers whose evaluations it waits for."""
        return frozenset()

    def __or__(self, other: Rule) -> AnyOf:
        return AnyOf(self, other)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf(Rule):
    """Keeps what any of its rules keeps."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        if not rules:
            raise ValueError("AnyOf needs a rule at least: without one it would keep nothing")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"AnyOf joins rules such as LatestN(3), and this is {rule!r}")
        flat = ((*rule.rules,) if isinstance(rule, AnyOf) else (rule,) for rule in rules)
        object.__setattr__(self, "rules", tuple(one for some in flat for one in some))

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """See Rule."""
        return frozenset().union(*(rule.keeps(records, pending) for rule in self.rules))

    @property
    def metrics(self) -> frozenset[str]:
        """See Rule."""
        return frozenset().union(*(rule.metrics for rule in self.rules))

    @property
    def groups(self) -> frozenset[str]:
        """See Rule."""
        return frozenset().union(*(rule.groups for rule in self.rules))


@dataclass(frozen=True, slots=True)
class LatestN(Rule):
    """Keeps the ``n`` that were saved last."""

    n: int

    def __post_init__(self) -> None:
        _check_count("LatestN", self.n)

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """See Rule."""
        return frozenset(record.attempt for record in records[-self.n :])


@dataclass(frozen=True, slots=True)
class BestN(Rule):
    """Keeps the ``n`` best by a ``metric`` that was reported; ``mode`` "min" or "max" says which end is good.

    Of equal ones the older. What has no such metric is none of them: with a ``group`` only once that group is done with it,
    whether it reported, gave up or passed it over, and until then it stays, unjudged. While there is no such group yet, all
    stay. Without a ``group`` it is judged at once, so that what is evaluated late must be kept by another rule meanwhile.
    """

    n: int
    metric: str
    mode: Literal["min", "max"]
    group: str | None = None

    def __post_init__(self) -> None:
        _check_count("BestN", self.n)
        if not is_metric(self.metric):
            raise ValueError(f"{self.metric!r} is not the name of a metric")
        if self.mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max", not {self.mode!r}')
        if self.group is not None and not is_name(self.group):
            raise ValueError(f"{self.group!r} is not the name of a group")

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """See Rule."""
        awaited = {
            record.attempt for record in records if self.group is not None and pending.awaits(self.group, record)
        }
        judged = [record for record in records if self.metric in record.metrics and record.attempt not in awaited]
        sign = 1.0 if self.mode == "min" else -1.0
        best = sorted(judged, key=lambda record: sign * record.metrics[self.metric])
        return frozenset(awaited.union(record.attempt for record in best[: self.n]))

    @property
    def metrics(self) -> frozenset[str]:
        """See Rule."""
        return frozenset({self.metric})

    @property
    def groups(self) -> frozenset[str]:
        """See Rule."""
        return frozenset() if self.group is None else frozenset({self.group})


@dataclass(frozen=True, slots=True)
class EveryHours(Rule):
    """Keeps the oldest, and then each that was saved at least ``hours`` after the last one kept so. May be fractional.

    By the times in the log. Where the clock went back, the next one is kept and counted from.
    """

    hours: float

    def __post_init__(self) -> None:
        if not 0 < self.hours < math.inf:
            raise ValueError(f"EveryHours needs a positive number of hours, not {self.hours!r}")

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """See Rule."""
        kept: list[CheckpointRecord] = []
        for record in records:
            passed = record.time - kept[-1].time if kept else math.inf
            if passed < 0 or passed >= self.hours * 3600.0:
                kept.append(record)
        return frozenset(record.attempt for record in kept)


@dataclass(frozen=True, slots=True)
class EveryNumbers(Rule):
    """Keeps those whose number is a multiple of ``n``: ``ckpt-1000``, ``ckpt-2000`` of ``EveryNumbers(1000)``."""

    n: int

    def __post_init__(self) -> None:
        _check_count("EveryNumbers", self.n)

    def keeps(self, records: Sequence[CheckpointRecord], pending: Pending = NOTHING_PENDING) -> frozenset[str]:
        """See Rule."""
        return frozenset(record.attempt for record in records if record.number % self.n == 0)


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep. ``max_to_keep`` None keeps all; hours may be fractional; 0 or None preserves none by age.

    Where there is a rule, ``keep``, it alone decides.
    """

    max_to_keep: float | None = 5
    keep_checkpoint_every_n_hours: float | None = None
    keep: Rule | None = None


def _check_count(what: str, n: int) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(f"{what} needs a whole number of at least 1, not {n!r}")
