"""The coordinator alone: many ranks' messages, the plan, and the commit, without the ranks and without Ray.

    python benchmarks/coordination.py [--ranks 128 512 1024 2048]

A child process runs the coordinator's shell and machine on a local folder and hears what ``ranks`` ranks with 300
tensors each would say. Shards are sparse files of the right size; index, manifest and log entry are real and synced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import planning
import pyarrow.compute as pc
from planning import LAYOUTS, describe, model

from distckpt.coordinator.messages import (
    AwaitPlan,
    Committed,
    Describe,
    FromRank,
    Join,
    Joined,
    OpenRun,
    Planned,
    Receipt,
    Reply,
    Request,
    Retention,
    RunOpened,
    ShardReceipt,
)
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.format import names
from distckpt.format.arrow.shard import block_size
from distckpt.sharding.description import decode_description
from distckpt.storage import LocalStore

RANKS = (128, 512, 1024, 2048)
WARM_SAVES = 1
NAME = "ckpt"
HEADER_BYTES = 1024
WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Figure:
    """What one process measured, in seconds and MB (10^6 bytes) of memory above that of a process with all imports.

    ``cold_plan``: from the first rank's word to the last one's knowledge of what it writes, in the first save.
    ``warm_join``: from the first rank's word to the last one's attempt in a later save, where nothing is planned.
    ``commit``: from the first receipt to the last rank's knowledge that its entry is in the log, over all saves.
    """

    ranks: int
    cold_plan: float
    warm_join: float
    commit: float
    memory: float


def measure(ranks: int, folder: Path, repetitions: int) -> list[Figure]:
    """Measure several times, each in a new process."""
    with _descriptions("fsdp", ranks, folder) as file:
        return [Figure(**_run(__file__, "--child", str(file))) for _ in range(repetitions)]


def plan_alone(layout: str, ranks: int, folder: Path, repetitions: int) -> list[float]:
    """Seconds that a cold planner takes for this layout, each in a new process."""
    with _descriptions(layout, ranks, folder) as file:
        runs = [_run(planning.__file__, "--child", layout, str(ranks), str(file)) for _ in range(repetitions)]
    return [run["seconds"] for run in runs]


@contextmanager
def _descriptions(layout: str, ranks: int, folder: Path) -> Iterator[Path]:
    """A file of what all ranks would describe, and beside it how long each description is; gone on exit."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as inside:
        file = Path(inside) / "descriptions"
        with file.open("wb") as out:
            sizes = [out.write(data) for data in describe(LAYOUTS[layout](ranks), model())]
        file.with_suffix(".json").write_text(json.dumps(sizes))
        yield file


def _run(script: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def _measure_here(file: Path) -> Figure:
    empty = _memory("VmRSS")
    with TemporaryDirectory(dir=file.parent) as run, file.open("rb") as source:
        store = LocalStore(run)
        shell = Shell(store, Settings())
        shell.start()
        sizes = json.loads(file.with_suffix(".json").read_text())
        gang = _Gang(shell, store, [source.read(size) for size in sizes])
        gang.open()
        cold, joins, commits = gang.first_join(), [], []
        for number in range(1, WARM_SAVES + 2):
            commits.append(gang.commit(number))
            joins.append(gang.later_join(number + 1))
        memory = _memory("VmHWM") - empty
        shell.close()
    return Figure(len(sizes), cold, float(np.median(joins)), float(np.median(commits)), memory)


class _Gang:
    """What all ranks say, one after the other. Each method returns the seconds until the last one was answered."""

    def __init__(self, shell: Shell, store: LocalStore, descriptions: list[bytes]) -> None:
        self._shell = shell
        self._store = store
        self._descriptions = descriptions
        self._ranks = range(len(descriptions))
        self._run = 0
        self._attempt = ""
        self._plan = ""
        self._receipts: list[ShardReceipt] = []

    def open(self) -> None:
        """All ranks report."""
        world = len(self._ranks)
        opened = self._ask(
            OpenRun("token", rank, world, "host", NAME, Retention(None), WAIT_SECONDS) for rank in self._ranks
        )
        assert isinstance(opened[0], RunOpened)
        self._run = opened[0].run

    def first_join(self) -> float:
        """All ranks describe what they hold and are told what they write."""
        begin = time.perf_counter()
        digests = [f"digest-{rank}" for rank in self._ranks]
        joined = self._ask(FromRank(self._run, rank, Join(1, 1, digests[rank])) for rank in self._ranks)
        assert all(isinstance(reply, Joined) and reply.describe for reply in joined)
        self._attempt = joined[0].attempt
        self._ask(
            FromRank(self._run, rank, Describe(self._attempt, digests[rank], self._descriptions[rank]))
            for rank in self._ranks
        )
        planned = self._ask(FromRank(self._run, rank, AwaitPlan(self._attempt)) for rank in self._ranks)
        seconds = time.perf_counter() - begin
        assert all(isinstance(reply, Planned) for reply in planned)
        self._plan = planned[0].plan
        self._receipts = [
            _receipt(description, reply.rows) for description, reply in zip(self._descriptions, planned, strict=True)
        ]
        return seconds

    def later_join(self, number: int) -> float:
        """All ranks join with what they have copied by the plan that they know."""
        begin = time.perf_counter()
        joined = self._ask(
            FromRank(self._run, rank, Join(number, number, f"digest-{rank}", self._plan, staged=True))
            for rank in self._ranks
        )
        seconds = time.perf_counter() - begin
        assert all(isinstance(reply, Joined) and not reply.describe for reply in joined)
        self._attempt = joined[0].attempt
        return seconds

    def commit(self, number: int) -> float:
        """All shards have landed, and the ranks say so."""
        folder = Path(self._store.url) / names.attempt_folder(NAME, number, self._attempt)
        folder.mkdir(parents=True)
        for rank, receipt in enumerate(self._receipts):
            with (folder / names.shard_name(rank, 0)).open("xb") as file:
                file.truncate(receipt.size)
        begin = time.perf_counter()
        told = self._ask(
            FromRank(self._run, rank, Receipt(self._attempt, (receipt,))) for rank, receipt in enumerate(self._receipts)
        )
        seconds = time.perf_counter() - begin
        assert all(isinstance(reply, Committed) for reply in told)
        return seconds

    def _ask(self, requests: Iterable[Request]) -> list[Reply]:
        futures: list[Future[Reply]] = [self._shell.submit(request) for request in requests]
        return [future.result(WAIT_SECONDS) for future in futures]


def _receipt(description: bytes, rows: bytes) -> ShardReceipt:
    """What a rank would say of its shard: sizes and blocks as they would be, checksums made up."""
    written = decode_description(description).take(np.frombuffer(rows, "<i4"))
    size = np.asarray(written["nbytes"])
    count = np.asarray(pc.list_element(written["length"], 0))
    block = np.array([block_size(*each) for each in zip(size.tolist(), (size // count).tolist(), strict=True)])
    room = -(-size // 64) * 64 + HEADER_BYTES
    blocks = int(np.maximum(1, -(-size // block)).sum())
    return ShardReceipt(
        shard=0,
        size=int(room.sum()) + HEADER_BYTES,
        crc32c=1,
        rows=len(size),
        positions=(np.cumsum(room) - room + HEADER_BYTES).astype("<i8").tobytes(),
        sizes=size.astype("<i8").tobytes(),
        block_sizes=block.astype("<i8").tobytes(),
        blocks=np.arange(blocks, dtype="<u4").tobytes(),
    )


def _memory(what: str) -> float:
    """This process's memory in MB: VmRSS is what it has now, VmHWM the most that it ever had."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Print the figures for growing numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(asdict(_measure_here(args.child))))
        return
    print("ranks  cold plan s  warm join s  commit s  memory MB")
    for ranks in args.ranks:
        (figure,) = measure(ranks, Path("bench-output"), 1)
        print(f"{ranks:5}{figure.cold_plan:13.3f}{figure.warm_join:13.3f}{figure.commit:10.3f}{figure.memory:11.0f}")


if __name__ == "__main__":
    main()
