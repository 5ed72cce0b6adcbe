"""Processes that do harm to themselves: a warm process forks them, so that none has to import torch again.

``python -m tests.crashing`` reads one JSON line for each request, and answers with one.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import resource
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
"""What the local store is made of; ``open`` counts if it creates a file."""

Say = Callable[[Any], None]


# ---- asking for processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended: ``signal`` is 0 unless one killed it; ``said`` is what it said before."""

    signal: int
    said: list[Any]


class Warm:
    """A process that has imported everything, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, function: Callable[..., object], **arguments: Any) -> int:
        """Have a new process call ``function(say, **arguments)``, a function of this module; its number."""
        return int(self._ask({"function": function.__name__, "arguments": arguments}))

    def end(self, number: int) -> Ended:
        """Wait for the end of a process that was started."""
        return Ended(**self._ask({"end": number}))

    def run(self, function: Callable[..., object], **arguments: Any) -> Ended:
        """Both."""
        return self.end(self.start(function, **arguments))

    def close(self) -> None:
        """End it."""
        stdin, stdout = self._pipes()
        stdin.close()
        self._process.wait(30)
        stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        stdin, stdout = self._pipes()
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def _pipes(self) -> Any:
        return self._process.stdin, self._process.stdout


@functools.cache
def warm() -> Warm:
    """The one that all tests of this process share."""
    made = Warm()
    atexit.register(made.close)
    return made


# ---- what they do ---------------------------------------------------------------------------------------------------


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
        """A call of a FaultyStore passes."""
        self.pass_by()


def save_and_die(say: Say, directory: str, numbers: Sequence[int], count: str, at: int | None, **options: Any) -> None:
    """Save ``numbers``, saying each; die before store call ("calls") or system call ("system") number ``at``.

    Or right after that many saves were acknowledged ("saves"). None: live, and say last how many moments there were.
    """
    from distckpt.storage import LocalStore
    from distckpt.testing.faulty import FaultyStore
    from tests.small_runs import Trainer, mount, mounting

    death = Death(at)
    store = FaultyStore(LocalStore(directory), death if count == "calls" else None)  # type: ignore[arg-type]
    with (
        mounting(),
        _system_calls(death if count == "system" else Death(None)),
        Trainer(mount(store), **options) as trainer,
    ):
        trainer.manager.restore_or_initialize()
        for number in numbers:
            trainer.saved(number)
            say(number)
            if count == "saves":
                death.pass_by()
    say(death.moments)


@contextmanager
def _system_calls(death: Death) -> Iterator[None]:
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


def save_below_a_limit(say: Say, directory: str, limit: int) -> None:
    """Save 1, then 2 while no file may have more than ``limit`` bytes, then 3; says what became of the last two."""
    from tests.small_runs import Trainer

    with Trainer(directory) as trainer:
        trainer.saved(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        error = trainer.save(2).exception(30)
        say(f"{type(error).__name__} {error}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        say(trainer.saved(3))


def save_against_others(say: Say, directory: str, first: int) -> None:
    """Three times over make a manager and save eight times, unless another takes over; says (number, what came of it)."""
    from distckpt.errors import DistckptError
    from tests.small_runs import Trainer

    for turn in range(3):
        try:
            with Trainer(directory, max_to_keep=3) as trainer:
                trainer.manager.restore_or_initialize()
                for number in range(first + 10 * turn, first + 10 * turn + 8):
                    error = trainer.save(number).exception(60)
                    say([number, "saved" if error is None else type(error).__name__])
                    if error is not None:
                        break
        except DistckptError as error:
            say([-1, type(error).__name__])


# ---- the warm process -----------------------------------------------------------------------------------------------


def _serve() -> None:
    import torch  # noqa: F401 - what takes long is imported once

    import distckpt.manager
    import distckpt.testing.faulty  # noqa: F401
    import tests.small_runs  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all of this process's memory
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    children: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = _end(children, request["end"]) if "end" in request else _fork(children, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(children: dict[int, int], request: dict[str, Any]) -> int:
    assert threading.active_count() == 1
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _live(request, writing)
    os.close(writing)
    children[child] = reading
    return child


def _live(request: dict[str, Any], pipe: int) -> None:
    def say(what: Any) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    try:
        globals()[request["function"]](say, **request["arguments"])
    except BaseException as error:  # noqa: BLE001 - a child must never run on into the code of its parent
        say(f"{type(error).__name__}: {error}")
    os._exit(0)


def _end(children: dict[int, int], child: int) -> dict[str, Any]:
    with os.fdopen(children.pop(child)) as pipe:
        said = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "said": said}


if __name__ == "__main__":
    _serve()
