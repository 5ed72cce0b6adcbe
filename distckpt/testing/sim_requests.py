"""A conditional request to a simulated store that answers in time, late or never, through proxies that may repeat it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Literal, Protocol

from distckpt.testing.sim_store import LinkT, SimulatedChain
from distckpt.testing.sim_world import LATEST, SimulatedWorld

TIMEOUT = 2.0
PATIENCE = 6.0
"""Seconds until a try is given up, and until nothing is tried any more."""

PAUSE = 0.5

Outcome = Literal["appended", "taken", "unknown"]


class Later(Protocol):
    """Does a step later in the life of whoever asks, unless that has ended; it waits while that is frozen."""

    def __call__(self, step: Callable[[], None], slowness: float = 1.0) -> None: ...


class Creation(Generic[LinkT]):
    """Creates one entry of a chain, as the stores of object stores do it (``creating.create``), for ``who``.

    Try, and where there is no clear yes, look: what is there is ours or another's; if it is nothing, try the same again.
    ``told`` gets what became of it, and the other entry. A try that was given up may be done all the same, much later.
    ``blind`` is the rule not to look that may be broken.
    """

    def __init__(
        self,
        world: SimulatedWorld,
        chain: SimulatedChain[LinkT],
        who: str,
        entry: LinkT,
        later: Later,
        told: Callable[[LinkT, Outcome, LinkT | None], None],
        blind: str,
    ) -> None:
        self._world = world
        self._chain = chain
        self._blind = blind
        self._who = who
        self._entry = entry
        self._later = later
        self._tell = told
        self._over = False
        self._end = world.time + world.random.choice([0.0, PATIENCE])

    def begin(self) -> None:
        """Send the request, from where nobody can call it back."""
        world, faults = self._world, self._world.faults
        fate = world.pick(
            lost=faults.lost_acknowledgement,
            late=faults.late_write,
            never=faults.failed_write,
            twice=faults.repeated_write,
        )
        if fate == "late":
            world.later(TIMEOUT + world.random.uniform(0.0, LATEST), self._arrive_late)
        elif fate != "never":
            world.later(world.latency(), lambda: self._arrive(fate))
        if fate in ("late", "never", "lost"):
            world.later(TIMEOUT, lambda: self._later(self._doubt))

    def _arrive_late(self) -> None:
        self._chain.put(self._who, self._entry, heard=False)

    def _arrive(self, fate: str) -> None:
        created = self._chain.put(self._who, self._entry, heard=not self._over)
        if fate == "twice":
            created = self._chain.put(self._who, self._entry)
        if fate != "lost":
            self._later(self._done if created else self._doubt)

    def _told(self, entry: LinkT, outcome: Outcome, found: LinkT | None) -> None:
        """What is under way of it still arrives, and nobody hears of that any more."""
        self._over = True
        self._tell(entry, outcome, found)

    def _done(self) -> None:
        self._told(self._entry, "appended", None)

    def _doubt(self) -> None:
        if self._blind in self._world.unsafe:
            self._told(self._entry, "taken", None)
        elif self._world.random.random() < self._world.faults.failed_look:
            self._again()
        else:
            self._later(self._look)

    def _look(self) -> None:
        found = self._chain.entries.get(self._entry.seq)
        if found is None:
            self._again()
        elif found.commit_id == self._entry.commit_id:
            self._later(self._done)
        else:
            self._later(lambda: self._told(self._entry, "taken", found))

    def _again(self) -> None:
        if self._world.time < self._end:
            self._world.later(PAUSE, lambda: self._later(self.begin))
        else:
            self._told(self._entry, "unknown", None)
