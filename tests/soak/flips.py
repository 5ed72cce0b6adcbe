"""Every byte of every file of a directory is flipped, and every file cut off at every length.

Whoever reads then gets what was saved, or an error of distckpt's: nothing else. And whoever verifies is told.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import distckpt
from distckpt.errors import DistckptError
from tests.soak.attack import Broken, Outcome
from tests.soak.subject import PATIENCE, Subject, read, save, stamp_of
from tests.support.checkpoints import write_checkpoint
from tests.support.crashing import Crashing, Say, run
from tests.support.small_runs import numbers, target, tree

KEEP = 2
NUMBERS = (1, 2)
ADDED = 7
ELEMENTS = 3
SLOW = 300.0
"""Seconds after which a case counts as hanging; after ``HANGS`` at one position it tells where."""
HANGS = 60.0
ID = re.compile(r"e\d+-[0-9a-f]{32}")


@dataclass
class Flips:
    """The attack. A case are ``each`` bytes of one file: each is flipped, and is the first that is cut off.

    At one position of ``runs`` a run opens the directory too, restores, saves and ends.
    """

    name: str = "flips"
    at_once: int = os.cpu_count() or 2
    each: int = 32
    runs: int = 32
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    _begin: Path = Path()

    def prepare(self, folder: Path) -> None:
        """What runs of one rank and of two have left."""
        self._begin = folder
        for world in WORLDS:
            ended = run(make, directory=str(folder / world), world=world)
            assert not ended.said, ended.said
            for path in files_of(folder / world):
                self.sizes[world, shown(path)] = (folder / world / path).stat().st_size

    def cases(self, dice: random.Random) -> Iterator[str]:
        """Every part of every file once; then again, each byte flipped another way."""
        parts = [
            (world, path, first) for (world, path), size in self.sizes.items() for first in range(0, size, self.each)
        ]
        while True:
            for world, path, first in dice.sample(parts, len(parts)):
                yield f"{world} {path} {first}:{first + self.each} {dice.randrange(1 << 32)}"

    def play(self, case: str, folder: Path) -> Outcome:
        """All positions of a part."""
        world, path, part, seed = case.split(" ")
        first, last = map(int, part.split(":"))
        directory = Path(shutil.copytree(self._begin / world, folder / "run"))
        told: dict[str, Any] = {"directory": str(directory), "path": path, "first": first, "last": last}
        with (folder / "stderr").open("w") as stderr:
            ended = Crashing(harm, stderr=stderr.fileno(), runs=self.runs, seed=int(seed), **told).end(SLOW)
        outcome = Outcome()
        for what, at, *broken in ended.said[:-1]:
            outcome.tried[what] += 1
            again = f"{world} {path} {at}:{at + 1} {seed}"
            outcome.broken += [Broken(self.name, again, what, complaint) for complaint in broken]
        if ended.said[-1:] != ["end"]:
            what = "hangs" if ended.late else "dies"
            after = f"after {ended.said[-1:]}: {(folder / 'stderr').read_text()[-3000:]}"
            outcome.broken.append(Broken(self.name, case, "flipped", f"a reader {what} {after}"))
        return outcome


def files_of(directory: Path) -> list[str]:
    """The paths of all files below a directory, relative to it."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def shown(path: str) -> str:
    """A path without what differs from directory to directory."""
    return ID.sub("*", path)


# ---- in the process ---------------------------------------------------------------------------------------------------


def make(say: Say, directory: str, world: str) -> None:
    """Save 1 and 2. The time stands still meanwhile, so that all files have the same length every time."""
    time.time = lambda: 1_700_000_000.25
    WORLDS[world](say, directory)


def _one_rank(say: Say, directory: str) -> None:
    save(say, directory, NUMBERS, KEEP, ELEMENTS)


def _two_ranks(say: Say, directory: str) -> None:
    for number in NUMBERS:
        large = torch.full((ELEMENTS,), number, dtype=torch.int64)
        write_checkpoint(directory, number, {"state": tree(number), "large": large}, ranks=2)


WORLDS: Mapping[str, Callable[[Say, str], None]] = {"one-rank": _one_rank, "two-ranks": _two_ranks}


def harm(say: Say, directory: str, path: str, first: int, last: int, seed: int, runs: int) -> None:
    """Do to each byte of a part of a file what a case says. Says what was done, where, and what was broken by it."""
    [file] = [Path(directory, found) for found in files_of(Path(directory)) if shown(found) == path]
    content = file.read_bytes()
    for at in range(first, min(last, len(content))):
        dice = random.Random(f"{seed} {at}")
        flipped = bytearray(content)
        flipped[at] ^= dice.choice((1 << dice.randrange(8), dice.randrange(1, 256)))
        for what, harmed in (("flipped", bytes(flipped)), ("cut off", content[:at])):
            faulthandler.dump_traceback_later(HANGS)
            file.write_bytes(harmed)
            say([what, at, *_broken(directory, path, dice, runs)])
        file.write_bytes(content)
    say("end")


def _broken(directory: str, path: str, dice: random.Random, runs: int) -> Iterator[str]:
    for number in NUMBERS:
        if not path.startswith("ckpt-") or path.startswith(f"ckpt-{number}/"):
            yield from _refused_or_right(_open, f"{directory}/ckpt-{number}", number)
            yield from _refused_or_right(_restore, f"{directory}/ckpt-{number}", number)
            if path.startswith("ckpt-"):
                yield from _refused_or_right(_verify, f"{directory}/ckpt-{number}")
    for look in dice.sample(LOOKS, 2):
        yield from _refused_or_right(look, directory)
    if dice.randrange(runs) == 0:
        copy = shutil.copytree(directory, f"{directory}-in-use")
        yield from _refused_or_right(_run, copy)
        shutil.rmtree(copy)


def _refused_or_right(look: Callable[..., None], *arguments: Any) -> Iterator[str]:
    try:
        look(*arguments)
    except DistckptError:
        return
    except BaseException:  # noqa: BLE001 - that is what must not be
        yield f"{look.__name__.strip('_')}: {traceback.format_exc()}"


def _open(path: str, number: int) -> None:
    assert read(path) == number, "another one was read"


def _restore(path: str, number: int) -> None:
    checkpoint = target()
    checkpoint.large = large = torch.zeros(ELEMENTS, dtype=torch.int64)
    checkpoint.restore(path)
    assert stamp_of(checkpoint.state, large) == number


def _verify(path: str) -> None:
    with distckpt.open(path) as reader:
        assert not reader.verify().good, "nothing was found"


def _newest(directory: str) -> None:
    assert read(directory) in NUMBERS


def _follow(directory: str) -> None:
    path = next(distckpt.checkpoints_iterator(directory, timeout=0), None)
    assert path in _paths(directory), path


def _latest(directory: str) -> None:
    path = distckpt.latest_checkpoint(directory)
    assert path in _paths(directory), path


def _exists(directory: str) -> None:
    assert distckpt.checkpoint_exists(f"{directory}/ckpt-2") in (False, True)


def _state_file(directory: str) -> None:
    distckpt.get_checkpoint_state(directory)  # it has no checksum, and nobody relies on it


LOOKS = (_newest, _follow, _latest, _exists, _state_file)


def _paths(directory: str) -> set[str | None]:
    return {None, *(f"{directory}/ckpt-{number}" for number in NUMBERS)}


def _run(directory: str) -> None:
    with Subject(directory, ELEMENTS, max_to_keep=KEEP) as subject:
        assert subject.restore() in (None, *NUMBERS)
        subject.save(ADDED).result(PATIENCE)
    assert read(directory) == ADDED
    assert numbers(directory)[-1] == ADDED
