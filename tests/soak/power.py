"""The power goes off at any moment of a run: every state in which a disk may be then, as far as nothing was synced.

A run is recorded once; a case is a moment of it, and a number of states that the disk may be in. A later process finds
each of them in a folder of its own, and must restore what was acknowledged by that moment, or something newer.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distckpt.directory import log
from distckpt.testing.power_loss import (
    AllKept,
    AllLost,
    Disk,
    Drawn,
    Fate,
    Tree,
    read_record,
    read_tree,
    write_tree,
)
from distckpt.testing.system_calls import Failure, SystemCalls
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import PATIENCE, Subject, complaints
from tests.support.crashing import Crashing, Say
from tests.support.preload import library

KEEP = 2
SLOW = 300.0
"""Seconds after which looking at the states of a case counts as hanging."""
DIRECTORY = "deep/down/run"


@dataclass
class Power:
    """The attack. Each case looks at ``drawn`` states that are drawn, beside those in which all is kept or lost.

    ``forgets``: which calls lie and do nothing; for a test of the attack itself.
    """

    name: str = "power"
    at_once: int = os.cpu_count() or 2
    drawn: int = 6
    runs: Sequence[str] = ()
    forgets: Failure | None = None
    moments: dict[str, int] = field(default_factory=dict)
    _records: Path = Path()

    def prepare(self, folder: Path) -> None:
        """A record of each of the runs."""
        self._records = folder
        for life in self.runs or RUNS:
            record = folder / life
            (folder / f"{life}-box").mkdir()
            ended = Crashing(
                be_recorded,
                preload=library(),
                folder=str(folder / f"{life}-box"),
                record=str(record),
                life=life,
                forgets=None if self.forgets is None else str(self.forgets),
            ).end(SLOW)
            assert self.forgets or ended.said == ["the record is complete"], ended
            self.moments[life] = len(read_record(record))

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Each moment of each run, again and again with other states."""
        moments = [(life, moment) for life, count in self.moments.items() for moment in range(1, count + 1)]
        while True:
            seed = dice.randrange(1 << 32)
            for life, moment in dice.sample(moments, len(moments)):
                yield f"{self._records / life} {moment} {seed}"

    def play(self, case: str, folder: Path) -> Outcome:
        """All states of one moment."""
        record, moment, seed = case.rsplit(" ", 2)
        told: dict[str, Any] = {"record": record, "moment": int(moment), "seed": int(seed), "drawn": self.drawn}
        ended = Crashing(look, folder=str(folder), **told).end(SLOW)
        outcome = Outcome()
        for kind, place, *broken in ended.said[:-1]:
            outcome.tried[kind] += 1
            outcome.broken += [Broken(self.name, case, kind, f"{place}: {complaint}") for complaint in broken]
        if ended.said[-1:] != ["end"]:
            what = "hangs" if ended.late else f"dies of {ended.signal}"
            outcome.broken.append(Broken(self.name, case, "drawn", f"the later process {what} in {folder}"))
        return outcome


# ---- in the process ---------------------------------------------------------------------------------------------------


def be_recorded(say: Say, folder: str, record: str, life: str, forgets: str | None) -> None:
    """Do what one of ``RUNS`` does in ``folder``; say whether the record accounts for all that is there then."""
    log.KEEP_ENTRIES = 4  # so that the log is pruned
    calls = SystemCalls(folder)
    calls.record(record)
    if forgets is not None:
        calls.fail(Failure.parse(forgets))
    RUNS[life](f"{folder}/{DIRECTORY}", lambda number: calls.mark(str(number)))
    calls.stop()
    disk = Disk()
    for event in read_record(record):
        disk.apply(event)
    if disk.after_power_loss(AllKept()) == read_tree(folder):
        say("the record is complete")


def _two_runs(directory: str, acknowledged: Callable[[int], object]) -> None:
    """One makes the directory and what is above it, the other finds it there; both delete."""
    for first in (1, 4):
        with Subject(directory, 0, max_to_keep=KEEP) as subject:
            subject.restore()
            for number in range(first, first + 3):
                subject.save(number).result(PATIENCE)
                acknowledged(number)


def _made_before(directory: str, acknowledged: Callable[[int], object]) -> None:
    """The user has made the directory just before."""
    os.makedirs(directory)
    with Subject(directory, 0, max_to_keep=KEEP) as subject:
        for number in (1, 2):
            subject.save(number).result(PATIENCE)
            acknowledged(number)


def _overlapping(directory: str, acknowledged: Callable[[int], object]) -> None:
    """Larger saves, of which two are in the making at once."""
    with Subject(directory, ELEMENTS["overlapping"], max_to_keep=KEEP, buffers=2) as subject:
        pending = [(number, subject.save(number)) for number in range(1, 6)]
        for number, one in pending:
            one.result(PATIENCE)
            acknowledged(number)


RUNS = {"two-runs": _two_runs, "made-before": _made_before, "overlapping": _overlapping}
ELEMENTS = {"overlapping": 20_000}


def look(say: Say, folder: str, record: str, moment: int, seed: int, drawn: int) -> None:
    """Say of each state what it is, where it is kept, and what is broken."""
    disk = Disk()
    for event in read_record(record)[:moment]:
        disk.apply(event)
    acknowledged = [int(mark) for mark in disk.marks]
    elements = ELEMENTS.get(Path(record).name, 0)
    seen: list[Tree] = []
    for at, (kind, fate) in enumerate(_fates(seed, moment, drawn)):
        tree = disk.after_power_loss(fate)
        if tree in seen:
            continue
        seen.append(tree)
        place, original = Path(folder, str(at)), Path(folder, f"{at}-as-it-was")
        for copy in (place, original):
            copy.mkdir()
            write_tree(tree, copy)
        broken = list(complaints(str(place / DIRECTORY), acknowledged, KEEP, elements))
        say([kind, str(original), *broken])
        if not broken:
            shutil.rmtree(place)
            shutil.rmtree(original)
    say("end")


def _fates(seed: int, moment: int, drawn: int) -> Iterator[tuple[str, Fate]]:
    yield "all kept", AllKept()
    yield "all lost", AllLost()
    for at in range(drawn):
        yield "drawn", Drawn(random.Random(f"{seed} {moment} {at}"))
