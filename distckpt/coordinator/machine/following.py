"""What groups of readers want, as retention and saves see it: what is kept for them, and whether one lags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from distckpt.coordinator.messages import Lag
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.keep import Pending


@dataclass(frozen=True, slots=True)
class Following:
    """One group, when it was read. ``claimed`` are attempts that its workers have, ``waiting`` those that it wants besides.

    ``waiting`` is in the order of commits, oldest first; ``every`` says that it wants each checkpoint, not the newest alone.
    """

    group: str
    every: bool
    max_backlog: int
    on_lag: str
    claimed: frozenset[str] = frozenset()
    waiting: tuple[str, ...] = ()

    @property
    def wanted(self) -> frozenset[str]:
        """Attempts about which it may still have something to say."""
        return self.claimed.union(self.waiting)

    @property
    def held(self) -> frozenset[str]:
        """Attempts that stay for it."""
        return self.wanted if self.every else self.claimed

    @property
    def surplus(self) -> frozenset[str]:
        """Those of them that it would do without, if that is said before."""
        lets_go = self.every and self.on_lag == "skip"
        return frozenset(self.waiting[: max(0, len(self.waiting) - self.max_backlog)]) if lets_go else frozenset()


@dataclass(frozen=True, slots=True)
class Followed:
    """All groups of a directory, as they were when the log had so many ``commits``.

    ``unclear`` are attempts on which a report lies that cannot be read.
    """

    groups: tuple[Following, ...] = ()
    commits: int = 0
    unclear: frozenset[str] = frozenset()

    @property
    def held(self) -> frozenset[str]:
        """Attempts that stay for a group."""
        return frozenset().union(*(group.held for group in self.groups))

    @property
    def pending(self) -> Pending:
        """For rules that wait for evaluations."""
        return Pending({group.group: group.wanted for group in self.groups}, self.commits)

    def is_news(self, record: CheckpointRecord) -> bool:
        """Whether it was committed after the groups were read, so that nobody knows who wants it."""
        return bool(self.groups) and record.order > self.commits

    def without_surplus(self) -> Followed:
        """As if every group that may be skipped had been told what it does not get."""
        return dataclasses.replace(self, groups=tuple(_curtailed(group) for group in self.groups))

    def at_rest(self, state: State) -> Followed:
        """As if no group wanted anything, and no report were unclear."""
        groups = tuple(dataclasses.replace(group, claimed=frozenset(), waiting=()) for group in self.groups)
        return Followed(groups, state.commits)

    def lag(self, state: State, saving: int) -> Lag | None:
        """The group for which the next save waits, with so many saves under way; None if it need not wait."""
        blocking = [group for group in self.groups if group.every and group.on_lag == "block"]
        alive = state.alive() if blocking else {}
        for group in blocking:
            most = max(1, group.max_backlog)
            there = (attempt in alive or state.may_have_in_pages(attempt) for attempt in group.waiting)
            waiting = sum(there) + state.commits - self.commits + saving
            if waiting >= most:
                return Lag(group.group, waiting, most)
        return None


def _curtailed(group: Following) -> Following:
    gone = group.surplus
    return dataclasses.replace(group, waiting=tuple(attempt for attempt in group.waiting if attempt not in gone))
