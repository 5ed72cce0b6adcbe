"""What the ways out of a process have in common: which managers they tell of."""

from __future__ import annotations

import time
from dataclasses import dataclass

from distckpt.coordinator.client.client import Client
from distckpt.rank.costs import Costs
from distckpt.telemetry.readings import Moment


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A manager. Its ``labels`` are in the order of LABELS."""

    labels: tuple[str, ...]
    costs: Costs
    client: Client

    def now(self) -> Moment:
        """What there is to tell. Takes microseconds, and holds nobody up."""
        opened = self.client.opened
        run = None if opened is None else opened.run
        return Moment(self.costs.stats(), self.costs.newest, run, time.time())


class Outlet:
    """A way out, for all managers of the process that go by it. Of two with the same labels it tells of the newer one."""

    def __init__(self) -> None:
        self._sources: tuple[Source, ...] = ()

    @property
    def told_of(self) -> tuple[Source, ...]:
        """One for each set of labels."""
        return tuple({each.labels: each for each in self._sources}.values())

    def add(self, source: Source) -> None:
        """Tell of it from now on."""
        self._sources = (*self._sources, source)

    def remove(self, source: Source) -> bool:
        """Tell of it no more; whether it was the last, so that this has come to its end."""
        ends = self._sources == (source,) and self.close()
        self._sources = tuple(each for each in self._sources if each is not source)
        return ends

    def close(self) -> bool:
        """Come to an end, unless it has none; whether it has."""
        return True

    def forget_in_child(self) -> None:
        """This is a forked child, which has no managers: let go of what only the parent may use."""
        self._sources = ()
