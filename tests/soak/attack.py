"""What every attack is: cases that are told apart by a text, and what came of playing one."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Broken:
    """A promise that did not hold: ``case`` plays it again."""

    attack: str
    case: str
    kind: str
    what: str

    @property
    def replay(self) -> str:
        """The command that does the same again."""
        return f"python -m tests.soak --only {self.attack} --play '{self.case}'"


@dataclass
class Outcome:
    """What was tried, by kind, and what of it broke a promise; ``seen`` counts what else there was to tell."""

    tried: Counter[str] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, other: Outcome) -> None:
        """Count another one in."""
        self.tried += other.tried
        self.broken += other.broken
        self.seen += other.seen


class Attack(Protocol):
    """Cases, each played in processes of its own in a new folder, so that several can be played at once."""

    @property
    def name(self) -> str:
        """One word."""

    @property
    def at_once(self) -> int:
        """How many cases are played at a time."""

    def prepare(self, folder: Path) -> None:
        """Make in ``folder`` what all cases begin with."""

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Cases in the order in which to play them, each different; an attack may run out of them."""

    def play(self, case: str, folder: Path) -> Outcome:
        """Play one, in an empty folder; what is left there is kept if it broke anything. ValueError: no such case."""


@dataclass
class Attacked:
    """What became of one attack. ``complete``: there was no case left to play."""

    name: str
    outcome: Outcome = field(default_factory=Outcome)
    seconds: float = 0.0
    complete: bool = False

    @property
    def title(self) -> str:
        """Its name, and how long it took."""
        return f"{self.name}, {self.seconds:.0f} s{', all cases' if self.complete else ''}"

    @property
    def broken_by_kind(self) -> Counter[str]:
        """How many promises were broken by what was tried."""
        return Counter(broken.kind for broken in self.outcome.broken)


class Siege:
    """One attack below ``folder``, where what broke something is kept."""

    def __init__(self, attack: Attack, folder: Path) -> None:
        self._attack = attack
        self._folder = folder
        self._count = itertools.count()
        (folder / "begin").mkdir(parents=True)
        attack.prepare(folder / "begin")

    def play(self, case: str) -> Outcome:
        """Play one case."""
        folder = self._folder / str(next(self._count))
        folder.mkdir()
        outcome = self._attack.play(case, folder)
        if not outcome.broken:
            shutil.rmtree(folder)
        return outcome

    def run(self, dice: random.Random, seconds: float, told: Callable[[Broken], object]) -> Attacked:
        """Play cases until the time is up, and then those under way to their end; ``told`` hears at once what broke."""
        began = time.monotonic()
        attacked = Attacked(self._attack.name)
        cases = self._attack.cases(dice)
        with ThreadPoolExecutor(self._attack.at_once) as pool:
            playing: set[Future[Outcome]] = set()
            while True:
                while len(playing) < self._attack.at_once and time.monotonic() < began + seconds:
                    case = next(cases, None)
                    if case is None:
                        attacked.complete = True
                        break
                    playing.add(pool.submit(self.play, case))
                if not playing:
                    break
                done, playing = wait(playing, return_when=FIRST_COMPLETED)
                for future in done:
                    attacked.outcome.add(future.result())
                    for broken in future.result().broken:
                        told(broken)
        attacked.seconds = time.monotonic() - began
        return attacked
