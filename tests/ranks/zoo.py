"""The zoo on rank processes. Every function runs on all ranks of a gang; arguments and results are JSON."""

from __future__ import annotations

import random
import re
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DistckptError
from tests.state.zoo import ENTRIES
from tests.state.zoo.entry import Entry, take_steps
from tests.state.zoo.observe import Facts, describe, differences, observe
from tests.state.zoo.ranks import RANK_ENTRIES, RankEntry
from tests.state.zoo.roundtrip import GO_ON, random_states, round_trip

OPTIONS: dict[str, Any] = {"max_to_keep": None, "save_timeout": 15.0}

GLOO_SECONDS = 60


def _told(action: Callable[[], list[str]]) -> list[str]:
    """What the action found, or how it failed; the ranks leave together."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = action()
    except Exception as error:  # noqa: BLE001 - the test reports it under the name of the entry
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
        found = [f"{type(error).__name__}: {error} ({where})"]
    dist.monitored_barrier(timeout=timedelta(seconds=GLOO_SECONDS))
    return found


def _connect(directory: str) -> None:
    """Reach the coordinator once, so that no entry is blamed for what connecting does."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(own={"a": 1}), f"{directory}-first", **OPTIONS) as manager:
        manager.save(1).result(30)


def first_manager(directory: str) -> list[str]:
    """What the first manager of a process, its first save and its first restore change of the random numbers."""
    before = random_states()
    with distckpt.CheckpointManager(distckpt.Checkpoint(own={"a": 1}), directory, **OPTIONS) as manager:
        manager.save(1).result(30)
        manager.restore(1)
    return differences(before, random_states())


def drawn_meanwhile(directory: str) -> bool:
    """Whether random numbers that are drawn while the first manager of a process is opening are those of the seed."""
    random.seed(7)
    expected = [random.random() for _ in range(100_000)]
    random.seed(7)
    drawn = []
    with distckpt.CheckpointManager(distckpt.Checkpoint(own={"a": 1}), directory, **OPTIONS) as manager:
        pending = manager.save(1)
        while not pending.done():
            drawn.append(random.random())
            time.sleep(0.001)
    return drawn == expected[: len(drawn)]


def alike(directory: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Round trips of entries of which every rank holds the same; what differed, by entry."""
    _connect(directory)
    return {
        name: _told(lambda name=name, at=at: round_trip(ENTRIES[name], directory, at, **OPTIONS))  # type: ignore[misc]
        for at, name in enumerate(names, 1)
    }


def special(directory: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Round trips of what lives on ranks; what differed, by entry."""
    _connect(directory)
    found = {}
    for at, name in enumerate(names, 1):
        one = RANK_ENTRIES[name]
        check = _refused if one.refused else _batch_norm if name == "ddp-batch-norm" else _carried
        found[name] = _told(lambda one=one, at=at, check=check: check(one, directory, at))  # type: ignore[misc]
    return found


def _carried(one: RankEntry, directory: str, number: int) -> list[str]:
    if one.twin is None:
        return round_trip(one.entry(), directory, number, **OPTIONS)
    return _into_another(one.entry(), directory, number)


def _into_another(entry: Entry, directory: str, number: int) -> list[str]:
    """The twin is wrapped otherwise, so what must be equal is what it computes."""
    source = entry.start(seed=0)
    take_steps(source, 0, entry.steps)
    with distckpt.CheckpointManager(source.checkpoint, directory, **OPTIONS) as manager:
        manager.save(number).result(30)
    twin = entry.start_twin(seed=1)
    with distckpt.CheckpointManager(twin.checkpoint, directory, **OPTIONS) as manager:
        manager.restore(number)
    mine, other = source.objects["model"].parameters(), twin.objects["model"].parameters()
    found = []
    for at, (one, two) in enumerate(zip(mine, other, strict=True)):
        states = (source.objects["optimizer"].state[one], twin.objects["optimizer"].state[two])
        facts: tuple[Facts, Facts] = ({}, {})
        for value, state, into in zip((one, two), states, facts, strict=True):
            describe(f"parameter {at}", value, into)
            describe(f"state {at}", dict(state), into)
        found += differences(*facts)
    return found


def _batch_norm(one: RankEntry, directory: str, number: int) -> list[str]:
    """After the restore every rank has rank 0's buffers, as DDP would have sent them; training goes on as before."""
    entry = one.entry()
    source = entry.start(seed=0)
    take_steps(source, 0, entry.steps)
    with distckpt.CheckpointManager(source.checkpoint, directory, **OPTIONS) as manager:
        manager.save(number).result(30)
    wanted = {name: buffer.clone() for name, buffer in source.objects["model"].named_buffers()}
    own = {name: buffer.clone() for name, buffer in wanted.items()}
    for buffer in wanted.values():
        dist.broadcast(buffer, 0)
    if dist.get_rank() == 1 and all(torch.equal(own[name], wanted[name]) for name in own):
        return ["the ranks' buffers are equal, so this shows nothing"]
    twin = entry.start_twin(seed=1)
    with distckpt.CheckpointManager(twin.checkpoint, directory, **OPTIONS) as manager:
        manager.restore(number)
    found = []
    for name, buffer in twin.objects["model"].named_buffers():
        if not torch.equal(buffer, wanted[name]):
            found.append(f"{name}: {buffer.tolist()} is not rank 0's {wanted[name].tolist()}")
    ends = []
    for run in (source, twin):
        facts: Facts = {}
        describe("losses", take_steps(run, entry.steps, GO_ON), facts)
        ends.append({**facts, **observe(run)})
    return found + differences(*ends)


def _refused(one: RankEntry, directory: str, number: int) -> list[str]:
    """Every save fails on every rank, also the second one and a later manager's, naming the key and what to do."""
    run = one.entry().start(seed=0)
    take_steps(run, 0, 2)
    told: list[str] = []
    for _ in range(2):
        with distckpt.CheckpointManager(run.checkpoint, directory, **OPTIONS) as manager:
            told += [
                _refusal(lambda m=manager: m.prepare()),
                *(_refusal(lambda m=manager: _saved(m, number)) for _ in range(2)),
            ]  # type: ignore[misc]
    found = []
    for text in told:
        found += [] if one.refused in text else [f"the key {one.refused} is not named: {text or 'it was not refused'}"]
        found += [] if re.search(one.advice, text) else [f"it does not say what to do: {text}"]
    return found


def _saved(manager: distckpt.CheckpointManager, number: int) -> None:
    pending = manager.save(number)
    assert pending is not None
    pending.result(30)


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except DistckptError as error:
        return str(error)
    return ""


# ---- other numbers of ranks ------------------------------------------------------------------------------------------


def sharded_save(directory: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Train and save each entry; its state then, and after it has gone on."""
    return {name: _phase(lambda name=name: _save_one(name, directory)) for name in names}  # type: ignore[misc]


def sharded_restore(directory: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Restore each entry into a twin of other values; its state then, and after it has gone on."""
    return {name: _phase(lambda name=name: _restore_one(name, directory)) for name in names}  # type: ignore[misc]


def _number(name: str) -> int:
    return 1 + list(RANK_ENTRIES).index(name)


def _phase(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}

    def keep() -> list[str]:
        result.update(action())
        return []

    began = time.monotonic()
    failed = _told(keep)
    return {**result, "failed": failed, "seconds": time.monotonic() - began}


def _save_one(name: str, directory: str) -> dict[str, Any]:
    entry = RANK_ENTRIES[name].entry()
    run = entry.start(seed=0)
    take_steps(run, 0, entry.steps)
    with distckpt.CheckpointManager(run.checkpoint, directory, **OPTIONS) as manager:
        manager.save(_number(name)).result(30)
    at_save = observe(run)
    return {"restored": at_save, "after": _after(entry, run)}


def _restore_one(name: str, directory: str) -> dict[str, Any]:
    entry = RANK_ENTRIES[name].entry()
    twin = entry.start_twin(seed=1)
    with distckpt.CheckpointManager(twin.checkpoint, directory, **OPTIONS) as manager:
        manager.restore(_number(name))
    restored = observe(twin)
    return {"restored": restored, "after": _after(entry, twin)}


def _after(entry: Entry, run: Any) -> Facts:
    losses: Facts = {}
    describe("losses", take_steps(run, entry.steps, GO_ON), losses)
    return {**(losses if dist.get_rank() == 0 else {}), **observe(run)}
