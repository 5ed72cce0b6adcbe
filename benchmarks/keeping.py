"""What a commit, a look and a coordinator's memory cost where many checkpoints are kept already: one process, no Ray, in
memory, where no disk hides it."""

from __future__ import annotations

import gc
import shutil
import time
import tracemalloc
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rounds import Spans, alternate, now

import distckpt
from distckpt.directory.log import append
from distckpt.directory.pages import write_page
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.paging import SIZES, next_page, turned
from distckpt.storage import LocalStore

KEPT = {10: 10, 300: 300, 3000: 3000, 100_000: None}
"""How many there are, and the max_to_keep with which the run goes on. None: all are kept, so older ones are in pages."""

SAVES = 10
LOOKS = 20
REMEMBERED = 90
PAUSE_SECONDS = 0.05
REST_SECONDS = 3.0


@dataclass
class Kept:
    """A manager in a directory whose log lists ``count`` checkpoints."""

    count: int
    folder: Path
    manager: distckpt.CheckpointManager

    @property
    def name(self) -> str:
        """How many there are."""
        return f"{self.count:,}"

    def run(self, number: int) -> Spans:
        """``SAVES`` saves, each until it is committed. A pause after each is not measured: what follows a commit ends in it.
        Then ``LOOKS`` looks at the newest, each in a directory that is opened anew."""
        spent, begin = 0.0, now()
        for at in range(SAVES):
            time.sleep(PAUSE_SECONDS)
            started = now()
            pending = self.manager.save(self.count + SAVES * number + at)
            pending.result()
            spent += now() - started
        time.sleep(PAUSE_SECONDS)
        started = now()
        for _ in range(LOOKS):
            assert distckpt.latest_checkpoint(self.folder) is not None
        looked = now() - started
        return {"commit": (begin, begin + spent / SAVES), "look": (begin, begin + looked / LOOKS)}

    def clean(self, number: int) -> None:
        """All of it goes at the end."""


def commits(folder: str, repetitions: int) -> dict[str, Any]:
    """Seconds from a save of a few bytes to its commit, and of a look, and bytes of a manager, by how many are kept."""
    contenders = [_kept(Path(folder) / str(count), count, most) for count, most in KEPT.items()]
    measured = alternate(contenders, repetitions)
    for contender in contenders:
        contender.manager.close()
        measured[contender.name]["memory"] = [(0, _memory(contender))]
    shutil.rmtree(folder)
    return {"measured": measured, "bytes": 0}


def _memory(kept: Kept) -> int:
    """Bytes of Python's memory that a manager, with its coordinator, takes once it remembers as many saves as it ever will."""
    gc.collect()
    tracemalloc.start()
    with _manager(kept.folder, KEPT[kept.count]) as manager:
        for number in range(10**6, 10**6 + REMEMBERED):
            pending = manager.save(number)
            pending.result()
        manager.wait()
        held = _at_rest()
    tracemalloc.stop()
    return held


def _at_rest() -> int:
    """Traced bytes once they change no more: a collection of garbage, every ten minutes, knows all attempts meanwhile."""
    before, held = 0.0, 1.0
    while abs(held - before) > 0.01 * held:
        time.sleep(REST_SECONDS)
        gc.collect()
        before, held = held, float(tracemalloc.get_traced_memory()[0])
    return int(held)


def _kept(folder: Path, count: int, most: int | None) -> Kept:
    """The checkpoints are made up: a commit only carries their records along."""
    store = LocalStore(folder)
    began = time.time() - count
    records = tuple(
        CheckpointRecord(
            name="ckpt",
            number=number,
            attempt=f"e1-{number:08x}{uuid.uuid4().hex[:24]}",
            manifest_size=1000,
            manifest_crc32c=number,
            time=began + number,
            world_size=8,
            nbytes=1 << 30,
            order=number + 1,
        )
        for number in range(count)
    )
    state = State(
        active=records, last_preserved_timestamp=began - 1.0, run=1, run_token="bench", saves=count, commits=count
    )
    while most is None and (found := next_page(state, SIZES, active=True)) is not None:
        page = f"e1-{uuid.uuid4().hex}"
        state = turned(state, write_page(store, page, *found), found[1])
    result = append(store, Entry(1, 1, 1, "commit", time.time(), uuid.uuid4().hex, state))
    assert result.outcome == "appended", result
    store.put_if_absent(f"ckpt-{count - 1}/{records[-1].attempt}/{names.MANIFEST}", b"made up")
    return Kept(count, folder, _manager(folder, most))


def _manager(folder: Path, most: int | None) -> distckpt.CheckpointManager:
    checkpoint = distckpt.Checkpoint(model=torch.nn.Linear(8, 8), step=3)
    return distckpt.CheckpointManager(checkpoint, folder, max_to_keep=most)
