"""A process that saves all the time is killed at a moment that nobody has chosen, again and again in one directory.

A case is a row of such lives. Each begins with a look at what those before have left.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import distckpt
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import PATIENCE, Subject, Witness, found_later, judge, lost, number_of, save, stamp
from tests.support.crashing import Crashing, Say, run

HANGS = 120.0
"""Seconds that it may take a process to die."""


@dataclass
class Kills:
    """The attack: so many ``lives`` a case, each of ``longest`` seconds at the most."""

    name: str = "kills"
    at_once: int = os.cpu_count() or 2
    lives: int = 8
    longest: float = 1.0

    def prepare(self, folder: Path) -> None:
        """Find out how long a life is: as long as it takes, on this machine, to open a directory and save five times."""
        run(save, directory=str(folder / "run"), numbers=[1], keep=1, elements=3000)
        began = time.monotonic()
        ended = run(save, directory=str(folder / "run"), numbers=[2, 3, 4, 5, 6], keep=1, elements=3000)
        assert not ended.said, ended.said
        self.longest = time.monotonic() - began

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Seeds."""
        while True:
            yield str(dice.randrange(1 << 32))

    def play(self, case: str, folder: Path) -> Outcome:
        """All lives in one directory, and a last look."""
        dice = random.Random(int(case))
        directory, keep, elements = str(folder / "run"), dice.choice((1, 2, 3)), dice.choice((3, 3000, 300_000))
        witness, outcome = Witness(), Outcome()
        broken: list[str] = []
        for life in range(1, self.lives + 1):
            acknowledged, buffers = sorted(witness.acknowledged), dice.choice((1, 2))
            process = Crashing(
                live,
                directory=directory,
                life=life,
                acknowledged=acknowledged,
                keep=keep,
                elements=elements,
                buffers=buffers,
            )
            process.heard()
            time.sleep(self.longest * dice.random())
            process.kill()
            broken += [f"life {life}: {what}" for what in witness.hear(process.end(HANGS).said)]
            outcome.tried["killed"] += 1
        outcome.seen["saves acknowledged"] = len(witness.acknowledged)
        told = {"acknowledged": sorted(witness.acknowledged), "keep": keep, "elements": elements}
        broken += found_later(judge, directory=directory, **told)
        outcome.broken += [Broken(self.name, case, "killed", f"{what}\n(in {folder})") for what in broken]
        return outcome


def live(
    say: Say, directory: str, life: int, acknowledged: Sequence[int], keep: int, elements: int, buffers: int
) -> None:
    """Look at what is there, restore it, and save until death comes; say what a ``Witness`` wants to hear."""
    say(["alive", life])
    try:
        if os.path.isdir(directory):
            for complaint in lost(directory, acknowledged, keep):
                say(["broken", complaint])
        with Subject(directory, elements, max_to_keep=keep, buffers=buffers) as subject:
            restored = subject.restore()
            say(["restored", restored])
            number = number_of(restored or 0)
            pending: deque[tuple[int, distckpt.PendingSave]] = deque()
            while True:
                number += 1
                say(["begun", stamp(number, life)])
                pending.append((stamp(number, life), subject.save(number, life)))
                while len(pending) >= buffers:
                    saved, one = pending.popleft()
                    one.result(PATIENCE)
                    say(["saved", saved])
    except BaseException:  # noqa: BLE001 - it is told as what it is
        say(["broken", traceback.format_exc()])
