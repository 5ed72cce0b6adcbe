"""Child processes of the demo: started with a log file each, and all ended, by their ids, when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

PATIENCE = 45.0
"""Seconds that a child may take to end: torchrun itself gives its ranks 30."""


@dataclass
class Child:
    """A process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self, within: float) -> bool:
        """Whether it has ended, or does so within that many seconds."""
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log_tail(self, lines: int = 25) -> str:
        """The end of what it has said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class Children:
    """Starts processes with that environment, each leader of a group; leaving the context ends those that still run."""

    folder: Path
    environment: dict[str, str]
    started: list[Child] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.started:
            self._signal(child, signal.SIGTERM)
        for child in self.started:
            if not child.ended(PATIENCE):
                self._signal(child, signal.SIGKILL)
                child.process.wait()

    def start(self, name: str, arguments: list[str]) -> Child:
        """Run Python with these arguments; the output goes to ``<name>.log``."""
        path = self.folder / f"{name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        child = Child(name, process, path)
        self.started.append(child)
        return child

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        if child.process.poll() is None:
            os.killpg(child.process.pid, number)
