"""What is saved under attack, each bit of which follows from a stamp, and how a later process judges what is left."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import distckpt
from distckpt.coordinator.client import client
from distckpt.coordinator.machine import ledger
from distckpt.storage import join
from tests.support.crashing import Crashing, Say
from tests.support.small_runs import fill, holds, numbers, tree

LIVES = 1_000_000
PATIENCE = 60.0
"""Seconds in which a save that nothing disturbs is done, on a busy machine too."""

HANGS = 180.0
"""Seconds after which a later process counts as hanging."""


def stamp(number: int, life: int) -> int:
    """What checkpoint ``number`` is made from, in that life of a process: a number saved again holds something else."""
    return life * LIVES + number


def number_of(stamped: int) -> int:
    """The number of the checkpoint that holds it."""
    return stamped % LIVES


def stamp_of(state: Any, large: torch.Tensor) -> int:
    """What all of this was made from. AssertionError if any bit is not as it was saved."""
    found = int(state["nested"]["step"])
    here = large.to_local() if isinstance(large, DTensor) else large
    assert holds(state, found), f"not all of it is from {found}"
    assert bool((here == found).all()), f"not all of the large tensor is from {found}"
    return found


class Subject:
    """A manager and what it saves: ``state``, and a large tensor, or so many elements of one.

    Use as a context manager.
    """

    def __init__(self, directory: str | os.PathLike[str], large: int | torch.Tensor, **options: Any) -> None:
        self._large = torch.zeros(large, dtype=torch.int64) if isinstance(large, int) else large
        self.checkpoint = distckpt.Checkpoint(state=tree(0), large=self._large)
        self.manager = distckpt.CheckpointManager(self.checkpoint, directory, **options)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.__exit__(*error)  # type: ignore[arg-type]

    def save(self, number: int, life: int = 0) -> distckpt.PendingSave:
        """Begin to save what ``number`` holds in that life."""
        self.fill(stamp(number, life))
        pending = self.manager.save(number)
        assert pending is not None
        return pending

    def fill(self, stamped: int) -> None:
        """Hold what is made from this stamp."""
        fill(self.checkpoint, stamped)
        self._large.fill_(stamped)

    def restore(self) -> int | None:
        """The stamp of what was restored, None if there was nothing. AssertionError if it is not what was saved."""
        path = self.manager.restore_or_initialize()
        if path is None:
            return None
        found = stamp_of(self.checkpoint.state, self._large)
        assert path.endswith(f"-{number_of(found)}"), f"{path} was restored, and holds {found}"
        return found


@contextlib.contextmanager
def impatience() -> Iterator[None]:
    """Inside, coordinator and ranks lose patience sooner than they do by default."""
    kept = ledger.FIRST_RETRY, client.OPEN_SECONDS
    ledger.FIRST_RETRY, client.OPEN_SECONDS = 0.02, 5.0
    try:
        yield
    finally:
        ledger.FIRST_RETRY, client.OPEN_SECONDS = kept


# ---- what a later process finds ---------------------------------------------------------------------------------------


Options = Mapping[str, Any] | None
"""The storage options for a directory."""


def read(path: str | os.PathLike[str], options: Options = None) -> int:
    """The stamp of the checkpoint at ``path``. DistckptError; AssertionError if it is not what was saved."""
    with distckpt.open(path, options) as reader:
        loaded = reader.load()
        found = stamp_of(loaded["state"], loaded["large"])
        assert number_of(found) == reader.manifest.number, f"{reader.path} holds {found}"
        return found


def lost(directory: str, acknowledged: Iterable[int], keep: int, options: Options = None) -> Iterator[str]:
    """What is missing, or another one, of the stamps that were acknowledged. What is not as it was saved raises."""
    found = {number: read(join(directory, f"ckpt-{number}"), options) for number in numbers(directory, options)}
    for stamped in acknowledged:
        number = number_of(stamped)
        if number not in found and sum(other > number for other in found) < keep:
            yield f"{stamped} was acknowledged, and there are {found}"
        if found.get(number, stamped) != stamped:
            yield f"{stamped} was acknowledged, and {found[number]} is in its place"


def complaints(
    directory: str, acknowledged: Sequence[int], keep: int, elements: int, options: Options = None
) -> Iterator[str]:
    """Everything that is broken when a run opens the directory, restores, saves and ends.

    ``acknowledged`` are the stamps that were told to be committed, ``keep`` is the retention of all runs.
    """
    try:
        if is_there(directory):
            yield from lost(directory, acknowledged, keep, options)
        with Subject(directory, elements, max_to_keep=keep, storage_options=options) as subject:
            known = numbers(directory, options)
            restored = subject.restore()
            if (None if restored is None else number_of(restored)) != (known[-1] if known else None):
                yield f"{restored} was restored, and there are {known}"
            if (restored or 0) < max(acknowledged, default=0):
                yield f"{max(acknowledged)} was acknowledged, and {restored} restored"
            added = max(known, default=0) + 1
            subject.save(added).result(PATIENCE)
        kept = [*known, added][-keep:]
        if numbers(directory, options) != kept:
            yield f"after the next save there are {numbers(directory, options)}, and not {kept}"
        for number in kept:
            assert number_of(read(join(directory, f"ckpt-{number}"), options)) == number
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        yield traceback.format_exc()


def is_there(directory: str) -> bool:
    """Whether there is anything to look at: a folder, or whatever a URL leads to."""
    return "://" in directory or os.path.isdir(directory)


@dataclass
class Witness:
    """Remembers what processes said that saved until they were killed, one after the other in one directory.

    They say pairs: ["restored", the stamp or None], then again and again ["begun", a stamp] and ["saved", a stamp], and
    ["broken", what]; whatever else they say does not matter here.
    """

    begun: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)

    @property
    def newest(self) -> int:
        """The number of the newest one that was acknowledged, 0 if none was."""
        return max(map(number_of, self.acknowledged), default=0)

    def hear(self, said: Sequence[Sequence[Any]]) -> Iterator[str]:
        """Take in what was said in one life, by all ranks if there were more; tells what of it must not be."""
        for restored in [detail for what, detail in said if what == "restored"]:
            if restored is not None and restored not in self.begun:
                yield f"{restored} was restored, and nobody has saved it"
            if number_of(restored or 0) < self.newest:
                yield f"{self.newest} was acknowledged, and {restored} restored"
        self.begun |= {detail for what, detail in said if what == "begun"}
        self.acknowledged |= {detail for what, detail in said if what == "saved"}
        yield from (str(detail) for what, detail in said if what == "broken")


# ---- in processes of their own ----------------------------------------------------------------------------------------


def found_later(look: Callable[..., None], **arguments: Any) -> list[str]:
    """All that ``inspect`` or ``judge`` find in a process of its own; that it dies or hangs is a find too."""
    ended = Crashing(look, **arguments).end(HANGS)
    found = [str(complaint) for complaint in ended.said]
    if ended.signal:
        found.append("a later process hangs" if ended.late else f"a later process dies of signal {ended.signal}")
    return found


def save(say: Say, directory: str, numbers: Sequence[int], keep: int, elements: int, options: Options = None) -> None:
    """Save these numbers, and end in order."""
    with Subject(directory, elements, max_to_keep=keep, storage_options=options) as subject:
        for number in numbers:
            subject.save(number).result(PATIENCE)


def inspect(say: Say, directory: str, acknowledged: Sequence[int], keep: int) -> None:
    """Say everything that a later reader finds broken."""
    faulthandler.dump_traceback_later(HANGS - 5)
    try:
        for complaint in lost(directory, acknowledged, keep) if is_there(directory) else ():
            say(complaint)
    except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
        say(traceback.format_exc())


def judge(
    say: Say, directory: str, acknowledged: Sequence[int], keep: int, elements: int, options: Options = None
) -> None:
    """Say everything that a later run finds broken."""
    faulthandler.dump_traceback_later(HANGS - 5)
    for complaint in complaints(directory, acknowledged, keep, elements, options):
        say(complaint)
