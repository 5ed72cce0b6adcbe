"""A process that saves all the time is killed at a moment that nobody has chosen, again and again in one directory.

A case is a row of such lives. Each begins with a look at what those before have left. In a bucket other programs look
too, after each life.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distckpt
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import (
    PATIENCE,
    Options,
    Subject,
    Witness,
    found_later,
    inspect,
    is_there,
    judge,
    lost,
    number_of,
    save,
    stamp,
)
from tests.support.crashing import Crashing, Say, run
from tests.support.places import PROTOCOLS, Place

HANGS = 120.0
"""Seconds that it may take a process to die."""

PATIENT = {"timeout": 30, "patience": 60}
"""Nothing is wrong with the servers; they are only busy."""


@dataclass
class Kills:
    """The attack: so many ``lives`` a case, each of ``longest`` seconds at the most.

    ``protocol`` is that by which directories are reached; '' for folders here.
    """

    protocol: str = ""
    at_once: int = os.cpu_count() or 2
    lives: int = 8
    longest: float = 1.0
    _port: int = 0

    @property
    def name(self) -> str:
        """See Attack."""
        return f"{self.protocol}-kills".removeprefix("-")

    def prepare(self, folder: Path) -> None:
        """Find out how long a life is: as long as it takes, on this machine, to open a directory and save five times."""
        if self.protocol:
            servers = ExitStack()
            atexit.register(servers.close)
            self._port = servers.enter_context(PROTOCOLS[self.protocol].serving()).port
        place = self._new_place()
        where: dict[str, Any] = {"directory": str(folder / "run")}
        if place is not None:
            where = {"directory": place.url, "options": {**place.options(), **PATIENT}}
        run(save, numbers=[1], keep=1, elements=3000, **where)
        began = time.monotonic()
        ended = run(save, numbers=[2, 3, 4, 5, 6], keep=1, elements=3000, **where)
        assert not ended.said, ended.said
        self.longest = time.monotonic() - began

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Seeds."""
        while True:
            yield str(dice.randrange(1 << 32))

    def play(self, case: str, folder: Path) -> Outcome:
        """All lives in one directory, and a last look."""
        dice = random.Random(int(case))
        keep, elements = dice.choice((1, 2, 3)), dice.choice((3, 3000, 300_000))
        place = self._new_place()
        where: dict[str, Any] = {"directory": str(folder / "run")}
        if place is not None:
            where = {"directory": place.url, "options": {**place.options(), **PATIENT}}
            elements = min(elements, place.protocol.elements)
        witness, outcome = Witness(), Outcome()
        broken: list[str] = []
        for life in range(1, self.lives + 1):
            acknowledged, buffers = sorted(witness.acknowledged), dice.choice((1, 2))
            process = Crashing(
                live,
                life=life,
                acknowledged=acknowledged,
                keep=keep,
                elements=elements,
                buffers=buffers,
                **where,
            )
            process.heard()
            time.sleep(self.longest * dice.random())
            process.kill()
            broken += [f"life {life}: {what}" for what in witness.hear(process.end(HANGS).said)]
            outcome.tried["killed"] += 1
            if place is not None:
                broken += self._seen_outside(place, folder / f"outside-{life}", sorted(witness.acknowledged), keep)
        outcome.seen["saves acknowledged"] = len(witness.acknowledged)
        told = {"acknowledged": sorted(witness.acknowledged), "keep": keep, "elements": elements}
        broken += found_later(judge, **where, **told)
        broken += [] if place is None else place.left_hidden()
        outcome.broken += [Broken(self.name, case, "killed", f"{what}\n(in {folder})") for what in broken]
        return outcome

    def _new_place(self) -> Place | None:
        return Place.new(PROTOCOLS[self.protocol], self._port) if self.protocol else None

    def _seen_outside(self, place: Place, folder: Path, acknowledged: Sequence[int], keep: int) -> list[str]:
        """What is wrong with the bucket as another program copies it to a folder."""
        folder.mkdir()
        place.copy_to(folder)
        found = found_later(inspect, directory=str(folder), acknowledged=acknowledged, keep=keep)
        if not found:
            shutil.rmtree(folder)
        return [f"seen from outside: {what}" for what in found]


def live(
    say: Say,
    directory: str,
    life: int,
    acknowledged: Sequence[int],
    keep: int,
    elements: int,
    buffers: int,
    options: Options = None,
) -> None:
    """Look at what is there, restore it, and save until death comes; say what a ``Witness`` wants to hear."""
    say(["alive", life])
    try:
        if is_there(directory):
            for complaint in lost(directory, acknowledged, keep, options):
                say(["broken", complaint])
        with Subject(directory, elements, max_to_keep=keep, buffers=buffers, storage_options=options) as subject:
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
