"""A run in one process that is disturbed: what it does, what it hears, and what is looked for afterwards."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distckpt.errors import DistckptError
from tests.soak.subject import Options, Subject, complaints, lost, number_of, read, stamp
from tests.support.checkpoints import write_checkpoint
from tests.support.small_runs import tree

KEEP = 2
BEFORE = (1, 2)
"""What the run finds: two ranks have saved it, and the run is one."""

SAVES = (3, 4)
"""What it saves, so that it deletes what it has found."""

SAVE_TIMEOUT, SLOW = 120.0, 180.0
"""Seconds until a save gives up, and until it counts as hanging: whatever else a machine has to do."""


def begin(directory: Path, elements: int) -> None:
    """Make what the run finds, in a local folder."""
    for number in BEFORE:
        content = {"state": tree(number), "large": torch.full((elements,), number, dtype=torch.int64)}
        write_checkpoint(directory, number, content, ranks=2)


def be_brief() -> None:
    """From now on a directory is opened with few requests in this process, and slow ones are given up sooner."""
    importlib.import_module("distckpt.storage.probe").__dict__.update(_RACERS_FAR=2, _MOST_ROUNDS_FAR=1)
    importlib.import_module("distckpt.storage.remote.http").__dict__.update(SLOWEST=4 << 20)


@dataclass
class Told:
    """What a run heard of what it did."""

    restored: int | None = None
    saved: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_undisturbed(self) -> bool:
        """Whether it did all that it was to do."""
        all_saved = self.saved == [stamp(number, 1) for number in SAVES]
        return self.restored == BEFORE[-1] and all_saved and not self.refused and not self.broken

    @property
    def acknowledged(self) -> list[int]:
        """What must not be lost."""
        return [*BEFORE, *self.saved]


def drive(url: str, elements: int, options: Options = None, save_timeout: float = SAVE_TIMEOUT) -> Told:
    """A run that restores, saves and ends, and then a reader. Errors of distckpt's are refusals; others are broken."""
    told = Told()
    known = {"max_to_keep": KEEP, "storage_options": options, "save_timeout": save_timeout}
    try:
        with Subject(url, elements, **known) as subject:
            told.restored = subject.restore()
            for number in SAVES:
                error = subject.save(number, 1).exception(SLOW)
                if error is None:
                    told.saved.append(stamp(number, 1))
                elif isinstance(error, DistckptError):
                    told.refused.append(f"save {number}: {type(error).__name__}: {error}")
                else:
                    told.broken.append("".join(traceback.format_exception(error)))
        found, newest = number_of(read(url, options)), max(map(number_of, told.acknowledged))
        if found < newest:
            told.broken.append(f"{newest} was acknowledged, and a reader found {found}")
    except DistckptError as error:
        told.refused.append(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        told.broken.append(traceback.format_exc())
    return told


def left_outside(directory: str, told: Told) -> Iterator[str]:
    """What is wrong with what the run has left, as a reader finds it."""
    try:
        yield from lost(directory, told.acknowledged, KEEP)
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        yield traceback.format_exc()


def left(
    url: str, told: Told, elements: int, options: Options = None, hidden: Callable[[], Iterable[str]] = tuple
) -> Iterator[str]:
    """What is wrong with what the run has left, and with the next one; ``hidden`` is asked at the end."""
    yield from complaints(url, told.acknowledged, KEEP, elements, options)
    try:
        yield from hidden()
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        yield traceback.format_exc()
