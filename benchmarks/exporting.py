"""A checkpoint made into the files of other programs, beside a copy of its own files: one process, all of it durable."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from rounds import Spans, alternate, now
from states import sharded_state

import distckpt
from distckpt.cli import main

KINDS = ("safetensors", "dcp", "torch")
PIECE = 8 << 20


@dataclass
class Copied:
    """Each file read and written again, by one thread in large pieces, and synced."""

    source: Path
    folder: Path
    name: str = "copy"

    def run(self, number: int) -> Spans:
        """To a new folder."""
        begin = now()
        for path in self.source.rglob("*"):
            if path.is_file():
                target = self.folder / self.name / f"{number}" / path.relative_to(self.source)
                target.parent.mkdir(parents=True, exist_ok=True)
                with path.open("rb") as file, target.open("wb") as to:
                    while piece := file.read(PIECE):
                        to.write(piece)
                    to.flush()
                    os.fsync(to.fileno())
        return {"seconds": (begin, now())}

    def clean(self, number: int) -> None:
        """All of it."""
        shutil.rmtree(self.folder / self.name)


@dataclass
class Exported:
    """``distckpt export`` in one of its formats; what it says is checked, so a failure is none of speed."""

    source: Path
    folder: Path
    name: str

    def run(self, number: int) -> Spans:
        """To a new folder."""
        (self.folder / self.name).mkdir()
        command = ["export", str(self.source), str(self.folder / self.name / f"{number}"), "--format", self.name]
        begin = now()
        done = CliRunner().invoke(
            main, [*command, "--select", "", "--leave-out", "step", "--leave-out", "save_counter"]
        )
        end = now()
        assert done.exit_code == 0, done.output
        return {"seconds": (begin, end)}

    def clean(self, number: int) -> None:
        """All of it."""
        shutil.rmtree(self.folder / self.name)


def exports(folder: str, repetitions: int) -> dict[str, Any]:
    """All formats and the copy in alternation."""
    where = Path(folder)
    path = Path(distckpt.Checkpoint(**sharded_state()).write(where / "saved"))
    contenders = [Copied(path, where), *(Exported(path, where, kind) for kind in KINDS)]
    return {"measured": alternate(contenders, repetitions)}
