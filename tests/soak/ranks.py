"""Two ranks that save all the time with Ray: all of them, one, or the coordinator is killed, again and again.

A case is a row of such lives in one directory. When the coordinator dies alone, the ranks must go on saving.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.soak.attack import Broken, Outcome
from tests.soak.subject import Witness, found_later, inspect, judge
from tests.support.actors import coordinator_pid, end_coordinator
from tests.support.gang import Gang
from tests.support.small_runs import until

RANKS = (0, 1)
ELEMENTS = 4000
HANGS = 120.0
"""Seconds in which ranks must open a directory, or go on when the coordinator has been killed."""

VICTIMS = ("coordinator", "one rank", "all ranks", "everything")


@dataclass
class Ranks:
    """The attack: so many ``lives`` a case."""

    name: str = "ranks"
    at_once: int = 1
    lives: int = 4
    _address: str = ""

    def prepare(self, folder: Path) -> None:
        """A Ray cluster of one node, which goes with this process."""
        import ray

        os.environ.setdefault("RAY_worker_niceness", "0")  # else the coordinator waits for whatever else runs here
        if not ray.is_initialized():
            ray.init(
                "local",
                num_cpus=4,
                object_store_memory=100 << 20,
                include_dashboard=False,
                namespace="distckpt",
                log_to_driver=False,
            )
        self._address = ray.get_runtime_context().gcs_address

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Seeds."""
        while True:
            yield str(dice.randrange(1 << 32))

    def play(self, case: str, folder: Path) -> Outcome:
        """All lives in one directory, and a last look by a process that does without Ray."""
        dice = random.Random(int(case))
        directory, keep = str(folder / "run"), dice.choice((1, 2))
        witness, outcome = Witness(), Outcome()
        for life in range(1, self.lives + 1):
            victim = dice.choice(VICTIMS)
            diary = Diary(folder / f"life-{life}")
            options = {"life": life, "elements": ELEMENTS, "max_to_keep": keep}
            with Gang(len(RANKS), {"RAY_ADDRESS": self._address}) as gang:
                gang.start("ranks.soak:live", directory=directory, diary=str(diary.path), **options)
                broken = list(_kill(gang, victim, directory, diary, dice))
            broken += witness.hear([line for rank in RANKS for line in diary.of(rank)])
            broken += found_later(inspect, directory=directory, acknowledged=sorted(witness.acknowledged), keep=keep)
            kind = f"{victim} killed"
            outcome.tried[kind] += 1
            outcome.broken += [Broken(self.name, case, kind, f"life {life}: {what}\n(in {folder})") for what in broken]
        outcome.seen["saves acknowledged"] = len(witness.acknowledged)
        told = {"acknowledged": sorted(witness.acknowledged), "keep": keep, "elements": ELEMENTS}
        last = found_later(judge, directory=directory, **told)
        with suppress(ValueError):  # else it would wait for its ranks for ten minutes
            end_coordinator(directory)
        outcome.broken += [Broken(self.name, case, kind, f"{what}\n(in {folder})") for what in last]
        return outcome


def _kill(gang: Gang, victim: str, directory: str, diary: Diary, dice: random.Random) -> Iterator[str]:
    """Kill it at some moment, and in the end whoever lives; tells what should not have been."""
    if dice.random() < 0.75 and not diary.grows_to(saves := dice.randrange(3)):
        yield f"{saves} saves were waited for: {diary}"
    time.sleep(dice.uniform(0, 0.5))
    if victim in ("coordinator", "everything"):
        _kill_coordinator(directory)
    if victim == "coordinator" and not diary.grows_to(diary.saves + 3):
        yield f"the coordinator died, and no more was saved: {diary}"
    for rank in [dice.choice(RANKS)] if victim == "one rank" else RANKS:
        gang.kill(rank)
    time.sleep(dice.uniform(0, 0.5))  # what is left goes on for a while
    for rank in RANKS:
        gang.kill(rank)


def _kill_coordinator(directory: str) -> None:
    from ray.exceptions import RayActorError

    with suppress(ValueError, RayActorError, ProcessLookupError):  # there is none yet, or it comes back just now
        os.kill(coordinator_pid(directory), signal.SIGKILL)


@dataclass(frozen=True)
class Diary:
    """What the ranks of one life write down, in a file each."""

    path: Path

    def of(self, rank: int) -> list[list[Any]]:
        """What one rank has written so far."""
        try:
            lines = Path(f"{self.path}-{rank}").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def saves(self) -> int:
        """How often rank 0 has saved."""
        return sum(what == "saved" for what, _ in self.of(0))

    def grows_to(self, saves: int) -> bool:
        """Whether rank 0 restores, and saves so often, within the time that is allowed."""
        until(lambda: self._has(saves) or self._has_ended, HANGS)
        return self._has(saves)

    def _has(self, saves: int) -> bool:
        return bool(self.of(0)) and self.saves >= saves

    @property
    def _has_ended(self) -> bool:
        return any(what in ("refused", "broken") for rank in RANKS for what, _ in self.of(rank))

    def __str__(self) -> str:
        return "; ".join(f"rank {rank}: {self.of(rank)[-3:]}" for rank in RANKS)
