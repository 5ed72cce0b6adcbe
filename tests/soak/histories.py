"""The simulator plays jobs full of trouble, each by a seed of its own, and every promise is checked in each."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distckpt.testing.history import GroupLogged, Held, Logged, ReadWhole
from distckpt.testing.promises import broken_promises
from distckpt.testing.simulator import simulate
from tests.soak.attack import Broken, Outcome
from tests.support.crashing import Crashing, Say

SEEDS = 1 << 62
KINDS = (Logged, GroupLogged, Held, ReadWhole)
"""What of a history is counted, for people."""

COLLECT_EVERY = 50
"""Histories between two collections of garbage, which else take a fifth of the time."""


@dataclass
class Histories:
    """The attack: a case is so many histories, of the seeds from one on. ``without`` is a rule that is broken in them."""

    count: int = 500
    without: str = ""

    @property
    def name(self) -> str:
        """See Attack."""
        return "histories"

    @property
    def at_once(self) -> int:
        """See Attack."""
        return len(os.sched_getaffinity(0))

    def prepare(self, folder: Path) -> None:
        """See Attack: they begin with nothing."""

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Seeds that nobody has chosen."""
        while True:
            yield f"{dice.randrange(SEEDS)} {self.count}"

    def play(self, case: str, folder: Path) -> Outcome:
        """All of them, in a process of their own."""
        first, count = map(int, case.split())
        ended = Crashing(play, first=first, count=count, without=self.without).end()
        outcome = Outcome()
        for told in ended.said:
            outcome.tried["a history"] += 1
            outcome.seen.update(told["seen"])
            for breach in told["broken"]:
                outcome.broken.append(Broken(self.name, f"{told['seed']} 1", "a history", breach))
        if len(ended.said) < count:
            seed = first + len(ended.said)
            outcome.tried["a history"] += 1
            outcome.broken.append(Broken(self.name, f"{seed} 1", "a history", f"seed {seed} did not come to its end"))
        return outcome


def play(say: Say, first: int, count: int, without: str) -> None:
    """Say of each history what is broken, and what there was in it."""
    gc.disable()
    for seed in range(first, first + count):
        history = simulate(seed, [without] if without else [])
        kinds = Counter(type(happening).__name__ for happening in history.happenings)
        seen = {kind.__name__: kinds[kind.__name__] for kind in KINDS}
        say({"seed": seed, "broken": broken_promises(history), "seen": seen})
        if seed % COLLECT_EVERY == 0:
            gc.collect()
