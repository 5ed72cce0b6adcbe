"""From a commit to whoever follows the directory: in a Ray cluster, told by the kernel, looking, and as the peers look.

This file is both: what ranks and followers run, and who starts them. A commit is the moment at which its entry got its name
on the file system, whose clock stands up to 4 ms behind: so much too long are these figures at most.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import distckpt
from distckpt.coordinator.client.news import find_news
from distckpt.directory import news
from distckpt.directory.log import read_entry, read_tail, sequence_numbers
from distckpt.format import names
from distckpt.storage import open_store

COMMITS = 40
FEW_COMMITS = 10
WORKERS = 2
PAUSE = 0.15
"""Seconds between two saves: workers are idle again by then."""
POLL_SECONDS = 1.0
"""How often TensorFlow's and Orbax's iterators look by default."""

HEARING, TOLD, LOOKING = "hearing", "told by the kernel", "looking"
BARE, ORBAX, TENSORFLOW = "a bare poll", "Orbax", "TensorFlow"


def hows() -> list[str]:
    """Ways to follow a directory without Ray; those of peers that are not there are left out."""
    peers = {ORBAX: "orbax", TENSORFLOW: "tensorflow"}
    return [TOLD, LOOKING, BARE, *(how for how, package in peers.items() if importlib.util.find_spec(package))]


def in_cluster(directory: str, how: str) -> list[list[float]] | None:
    """Run by two ranks: the first has workers in the Ray cluster where the coordinator lives. Milliseconds, by worker."""
    rank = torch.distributed.get_rank()
    with _manager(directory) as (manager, state):
        _save(manager, state, 1)  # now the coordinator is there, and Ray
        tasks = []
        if rank == 0:
            import ray

            follow = ray.remote(num_cpus=0)(_follow)
            tasks = [follow.remote(directory, how, COMMITS) for _ in range(WORKERS)]
            _wait_for(Path(directory, "followers"), WORKERS)
        torch.distributed.barrier()
        for number in range(2, COMMITS + 1):
            time.sleep(PAUSE)
            _save(manager, state, number)
        return [_latencies(directory, seen) for seen in ray.get(tasks)] if rank == 0 else None


def alone(directory: str, how: str, commits: int) -> list[float]:
    """Run by one rank without Ray, which another process follows. Milliseconds."""
    with _manager(directory) as (manager, state):
        _save(manager, state, 1)
        _commit_as_orbax(directory, 1)
        command = [sys.executable, __file__, directory, how, str(commits)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
            _wait_for(Path(directory, "followers"), 1)
            for number in range(2, commits + 1):
                time.sleep(PAUSE if how == TOLD else POLL_SECONDS * (1 + number / commits))
                _save(manager, state, number)
                _commit_as_orbax(directory, number)
            seen = json.loads(follower.communicate()[0])
    if how != ORBAX:
        return _latencies(directory, seen)
    committed = {number: Path(directory, ORBAX, f"{number}").stat().st_ctime_ns for number, _ in seen}
    return [(when - committed[number]) / 1e6 for number, when in seen if number > 1]


@contextlib.contextmanager
def _manager(directory: str) -> Iterator[tuple[distckpt.CheckpointManager, dict[str, Any]]]:
    state = {"weights": torch.zeros(1000)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), directory, max_to_keep=None) as manager:
        yield manager, state


def _save(manager: distckpt.CheckpointManager, state: dict[str, Any], number: int) -> None:
    state["weights"] += 1
    pending = manager.save(number)
    pending.result(60)


def _commit_as_orbax(directory: str, number: int) -> None:
    """A folder of that number gets its name: so Orbax's own iterator knows what is committed."""
    made = Path(directory, ORBAX, f"{number}.made")
    made.mkdir(parents=True)
    made.rename(made.with_suffix(""))


def _wait_for(folder: Path, count: int) -> None:
    """Until so many followers have seen the first checkpoint."""
    folder.mkdir(exist_ok=True)
    while len(list(folder.iterdir())) < count:
        time.sleep(0.05)


def _latencies(directory: str, seen: list[list[int]]) -> list[float]:
    """Milliseconds from each commit to its being seen; the first was there before."""
    store = open_store(directory)
    committed = {}
    for seq in sequence_numbers(store):
        newest = read_entry(store, seq).state.newest()
        if newest is not None:
            committed.setdefault(newest.number, Path(directory, names.entry_path(seq)).stat().st_ctime_ns)
    return [(when - committed[number]) / 1e6 for number, when in seen if number > 1]


# ---- who follows ----------------------------------------------------------------------------------------------------


def _follow(directory: str, how: str, last: int) -> list[tuple[int, int]]:
    """Which number was seen when, in nanoseconds of the system's clock, until ``last`` has come."""
    seen = []
    for number in _FOLLOWERS.get(how, _watching)(directory):
        seen.append((number, time.time_ns()))
        if len(seen) == 1:
            Path(directory, "followers").mkdir(exist_ok=True)
            Path(directory, "followers", f"{time.time_ns()}").touch()
        if number >= last:
            break
    return seen


def _hearing(directory: str) -> Iterator[int]:
    """What ``watch`` does before it takes a lease."""
    store, last = open_store(directory), 0
    heard = find_news(store)
    while True:
        heard.wait(60.0)
        newest = read_tail(store).state.newest()
        if newest is not None and newest.number != last:
            last = newest.number
            yield last


def _watching(directory: str) -> Iterator[int]:
    with distckpt.watch(directory) as watch:
        for checkpoint in watch:
            yield checkpoint.number
            checkpoint.ack()


def _looking(directory: str) -> Iterator[int]:
    news.can_ring = lambda path: False  # type: ignore[assignment]
    return _watching(directory)


def _bare_poll(directory: str) -> Iterator[int]:
    """The folder is listed every second, which is what the iterators of others do."""
    last = 0
    while True:
        numbers = [int(path.name[5:]) for path in Path(directory).glob("ckpt-*") if any(path.glob("*/manifest.json"))]
        if max(numbers, default=0) > last:
            last = max(numbers)
            yield last
        else:
            time.sleep(POLL_SECONDS)


def _orbax(directory: str) -> Iterator[int]:
    from orbax.checkpoint import checkpoint_utils

    return iter(checkpoint_utils.checkpoints_iterator(f"{directory}/{ORBAX}"))


def _tensorflow(directory: str) -> Iterator[int]:
    from tensorflow.train import checkpoints_iterator

    return (int(path.rpartition("-")[2]) for path in checkpoints_iterator(directory))


_FOLLOWERS: dict[str, Callable[[str], Iterator[int]]] = {
    HEARING: _hearing,
    LOOKING: _looking,
    BARE: _bare_poll,
    ORBAX: _orbax,
    TENSORFLOW: _tensorflow,
}


if __name__ == "__main__":
    print(json.dumps(_follow(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
