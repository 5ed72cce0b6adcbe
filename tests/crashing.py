"""Processes that are killed by SIGKILL at a chosen moment of a save: a warm one forks them, so each costs little.

``python -m tests.crashing`` reads one JSON line for each, and answers with one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

SYSTEM_CALLS = ("link", "unlink", "fsync", "replace", "mkdir", "rmdir", "pwrite", "open")
"""What the local store is made of; ``open`` creates files."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``signal`` is 0 for one that lived to its end; ``moments`` it has counted, ``said`` by it."""

    signal: int
    moments: int
    said: list[Any]


class Crashing:
    """A warm process that forks one that will die, at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(
        self, directory: Path, numbers: Sequence[int], count: str, at: int | None = None, **options: Any
    ) -> Ended:
        """Save ``numbers`` in a new process that dies before store call, or system call, number ``at``.

        ``count`` is "calls" of the store, "system" calls, or "acknowledged" saves. None: it lives.
        """
        asked = {"directory": str(directory), "numbers": list(numbers), "count": count, "at": at, "options": options}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the warm process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Death:
    """Counts moments and ends this process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.moments = 0
        self._at = at
        self._lock = threading.Lock()

    def pass_by(self) -> None:
        """A moment passes."""
        with self._lock:
            if self.moments == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.moments += 1

    def fault(self, call: object) -> None:
        """A store call, to a FaultyStore's script."""
        self.pass_by()


@contextmanager
def counting_system_calls(death: Death) -> Iterator[None]:
    """Each of SYSTEM_CALLS that this process makes is a moment, which passes before it is made."""
    kept = {name: getattr(os, name) for name in SYSTEM_CALLS}
    for name, call in kept.items():
        setattr(os, name, _counted(name, call, death))
    try:
        yield
    finally:
        for name, call in kept.items():
            setattr(os, name, call)


def _counted(name: str, call: Callable[..., Any], death: Death) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        if name != "open" or args[1] & os.O_CREAT:
            death.pass_by()
        return call(*args, **kwargs)

    return counted


def _serve() -> None:
    import torch  # noqa: F401 - what takes long is imported once

    import distckpt.manager  # noqa: F401
    import tests.small_runs  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        assert threading.active_count() == 1
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(asked, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = [json.loads(text) for text in pipe]
        _, status = os.waitpid(child, 0)
        moments = [one["moments"] for one in said if "moments" in one]
        ended = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "moments": moments[-1] if moments else -1,
            "said": [one["said"] for one in said if "said" in one],
        }
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


def _child(asked: dict[str, Any], pipe: int) -> None:
    from distckpt.storage import LocalStore
    from distckpt.testing.faulty import FaultyStore
    from tests.small_runs import Trainer, mount, mounting

    def say(what: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    death = Death(asked["at"])
    store = FaultyStore(LocalStore(asked["directory"]), death if asked["count"] == "calls" else None)
    try:
        with mounting(), counting_system_calls(death if asked["count"] == "system" else Death(None)):
            with Trainer(mount(store), **asked["options"]) as trainer:
                trainer.manager.restore_or_initialize()
                for number in asked["numbers"]:
                    trainer.saved(number)
                    say({"said": number})
                    if asked["count"] == "acknowledged":
                        death.pass_by()
        say({"moments": death.moments})
    except BaseException as error:  # noqa: BLE001 - a child must never run on into the code of its parent
        say({"said": f"{type(error).__name__}: {error}"})
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve()
