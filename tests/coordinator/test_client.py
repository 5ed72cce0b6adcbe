"""One rank's side of the conversation with a coordinator that is replaced."""

from __future__ import annotations

import contextlib
from pathlib import Path

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.client.line import LocalLine
from distckpt.coordinator.messages import Accepted, Heartbeat, Leave, OpenRun, Reply, Request, Unknown, kind_of
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.keep import Retention
from distckpt.storage import LocalStore


class Switched:
    """A line that leads to another coordinator when the first one is gone, and remembers what was asked."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lines = contextlib.ExitStack()
        self.asked: list[str] = []
        self.replace()

    def replace(self) -> None:
        """Another coordinator takes the place of this one."""
        shell = Shell(LocalStore(self._directory), Settings())
        shell.start()
        self._line = LocalLine(shell)
        self._lines.callback(self._line.close)

    def ask(self, request: Request, timeout: float) -> Reply:
        """See Line."""
        self.asked.append(kind_of(request))
        return self._line.ask(request, timeout)

    def close(self) -> None:
        """See Line."""
        self._lines.close()


def test_a_rank_that_leaves_a_new_coordinator_does_not_report_to_it_first(tmp_path: Path) -> None:
    line = Switched(tmp_path)
    client = Client(lambda: line, OpenRun("token", 0, 1, "host", "ckpt", Retention(), 30.0))
    client.connect()
    assert client.ask(Heartbeat(), 30) == Accepted()
    line.replace()
    assert client.ask(Heartbeat(), 30) == Unknown()
    assert line.asked == ["OpenRun", "Heartbeat", "Heartbeat", "OpenRun"]
    line.replace()
    assert client.ask(Leave(), 30) == Unknown()
    assert line.asked[4:] == ["Leave"]
    client.close()
