"""A store whose calls do not come back."""

from __future__ import annotations

import threading
from pathlib import Path

from distckpt.storage import LocalStore
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support.small_runs import mount


class Hang:
    """Calls of one operation, on paths that begin alike, do not come back before ``go``, once it is armed."""

    def __init__(self, operation: str, path: str) -> None:
        self.go = threading.Event()
        self.hanging = threading.Event()
        self.armed = False
        self._operation = operation
        self._path = path

    def fault(self, call: Call) -> Fault | None:
        """A delay, which is as long as it takes."""
        is_meant = self.armed and call.operation == self._operation and call.path.startswith(self._path)
        return Fault.DELAYED if is_meant else None

    def sleep(self, seconds: float) -> None:
        """The delay."""
        self.hanging.set()
        self.go.wait()


def hanging(directory: Path, operation: str, path: str) -> tuple[Hang, str]:
    """What makes a store on ``directory`` hang, and the URL of that store."""
    hang = Hang(operation, path)
    return hang, mount(FaultyStore(LocalStore(directory), hang, sleep=hang.sleep))
