"""What a commit costs where many checkpoints are kept already: one process, no Ray, in memory, where no disk hides it."""

from __future__ import annotations

import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rounds import Spans, alternate, now

import distckpt
from distckpt.directory.log import append
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.storage import LocalStore

KEPT = (10, 300, 3000)
SAVES = 10
PAUSE_SECONDS = 0.05


@dataclass
class Kept:
    """A manager in a directory whose log lists ``count`` checkpoints, one more at each save."""

    count: int
    manager: distckpt.CheckpointManager

    @property
    def name(self) -> str:
        """How many there are."""
        return str(self.count)

    def run(self, number: int) -> Spans:
        """``SAVES`` saves, each until it is committed. A pause after each is not measured: what follows a commit ends in it."""
        spent, begin = 0.0, now()
        for at in range(SAVES):
            time.sleep(PAUSE_SECONDS)
            started = now()
            pending = self.manager.save(self.count + SAVES * number + at)
            assert pending is not None
            pending.result()
            spent += now() - started
        return {"commit": (begin, begin + spent / SAVES)}

    def clean(self, number: int) -> None:
        """All of it goes at the end."""


def commits(folder: str, repetitions: int) -> dict[str, Any]:
    """Seconds from a save of a few bytes to its commit, by how many checkpoints are kept."""
    contenders = [_kept(Path(folder) / str(count), count) for count in KEPT]
    measured = alternate(contenders, repetitions)
    for contender in contenders:
        contender.manager.close()
    shutil.rmtree(folder)
    return {"measured": measured, "bytes": 0}


def _kept(folder: Path, count: int) -> Kept:
    """The checkpoints are made up: a commit only carries their records along."""
    now = time.time() - count
    records = tuple(
        CheckpointRecord(
            name="ckpt",
            number=number,
            attempt=f"e1-{number:08x}{uuid.uuid4().hex[:24]}",
            manifest_size=1000,
            manifest_crc32c=number,
            time=now + number,
            world_size=8,
            nbytes=1 << 30,
        )
        for number in range(count)
    )
    state = State(active=records, last_preserved_timestamp=now - 1.0, run=1, run_token="bench", saves=count)
    result = append(LocalStore(folder), Entry(1, 1, 1, "commit", time.time(), uuid.uuid4().hex, state))
    assert result.outcome == "appended", result
    checkpoint = distckpt.Checkpoint(model=torch.nn.Linear(8, 8), step=3)
    return Kept(count, distckpt.CheckpointManager(checkpoint, folder, max_to_keep=count))
