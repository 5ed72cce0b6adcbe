"""Looks for what the tests have not met yet: Hypothesis, the simulator and the dice with fresh seeds, for so long.

``python tests/explore.py SECONDS [FILE...]`` runs one file of tests after the other, each time with a new seed. What
fails is printed with the command that does the same again, and is the exit status in the end: 1 if anything failed.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEPENDS_ON_SEED = ("from hypothesis import", "seed: int", "part: Part", ".wide(")
HOW = ["--long", "--hypothesis-profile=explore"]
PYTEST = ["-m", "pytest", "-q", "-m", "hypothesis or seeded or wide", "--timeout=600", *HOW]
NOTHING_CHOSEN = 5  # pytest's exit status


@dataclass(frozen=True)
class Found:
    """A file of tests that failed with a seed."""

    file: str
    seed: int
    output: str

    @property
    def replay(self) -> str:
        """The command that does the same again."""
        return f"python -m pytest {self.file} {' '.join(HOW)} --hypothesis-seed={self.seed}"


def seeded_files() -> list[str]:
    """The files with tests that a seed changes."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if any(word in file.read_text() for word in DEPENDS_ON_SEED)]


def explore(files: list[str], seconds: float) -> Iterator[Found]:
    """Everything that fails until the time is up. What runs at that moment is ended."""
    end = time.monotonic() + seconds
    dice = random.SystemRandom()
    while True:
        for file in dice.sample(files, len(files)):
            seed = dice.randrange(1 << 32)
            try:
                found = run(file, seed, end - time.monotonic())
            except subprocess.TimeoutExpired:
                return
            if found is not None:
                yield found


def run(file: str, seed: int, seconds: float) -> Found | None:
    """Run one file with a seed; None if all is well. TimeoutExpired after so many seconds, when it has been ended."""
    began = time.monotonic()
    command = [sys.executable, *PYTEST, f"--hypothesis-seed={seed}", file]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(0.0, seconds),
        check=False,
    )
    good = ended.returncode in (0, NOTHING_CHOSEN)
    print(f"{'passed' if good else 'FAILED'}  {file}  seed {seed}  {time.monotonic() - began:.0f} s", flush=True)
    return None if good else Found(file, seed, ended.stdout)


def main(seconds: float, files: list[str]) -> int:
    """The exit status."""
    failed = []
    for found in explore(files or seeded_files(), seconds):
        failed.append(found)
        print(f"{found.output}\nThe same again: {found.replay}\n", flush=True)
    for found in failed:
        print(f"failed: {found.replay}")
    print(f"{len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
