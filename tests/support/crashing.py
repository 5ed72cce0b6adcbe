"""Processes that do harm to themselves."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.warm import warm

SYSTEM_CALLS = ("link", "unlink", "fsync", "replace", "mkdir", "rmdir", "pwrite", "open")
"""What the local store is made of; ``open`` counts if it creates a file."""

Say = Callable[[Any], None]


# ---- asking for processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended: ``signal`` is 0 unless one killed it; ``said`` is what it said before.

    ``late`` if it was killed because its time was up.
    """

    signal: int
    said: list[Any]
    late: bool = False


class Crashing:
    """A process in which ``function(say, **arguments)``, a function of a module of the tests, runs.

    ``preload`` is a library that it preloads.
    """

    def __init__(
        self, function: Callable[..., object], *, preload: str = "", stderr: int = 2, **arguments: Any
    ) -> None:
        told = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
        self._process = warm(preload).start("support.crashing:live", told, stderr)

    def heard(self) -> Any:
        """What it says next."""
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """By SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """As Popen."""
        self._process.send_signal(number)

    def has_ended(self, seconds: float) -> bool:
        """Whether it has, within so many seconds. What it has said is to be asked for by ``end``."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, limit: float | None = None) -> Ended:
        """Wait for its end, at most so many seconds; then it is killed."""
        late = threading.Event()
        impatient = threading.Timer(threading.TIMEOUT_MAX if limit is None else limit, self._give_up, [late])
        impatient.daemon = True
        impatient.start()
        with self._process as process:
            said = [json.loads(line) for line in process.stdout if line.endswith("\n")]
            ended = process.wait()
        impatient.cancel()
        return Ended(max(0, -ended), said, late.is_set())

    def _give_up(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()


def run(function: Callable[..., object], **arguments: Any) -> Ended:
    """Call ``function(say, **arguments)``, a function of a module of the tests, in a process of its own."""
    return Crashing(function, **arguments).end()


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
    from tests.support.small_runs import Trainer, mount, mounting

    death = Death(at)
    store = FaultyStore(LocalStore(directory), death if count == "calls" else None)
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
    from tests.support.small_runs import Trainer

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
    from tests.support.small_runs import Trainer

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


# ---- in the process -------------------------------------------------------------------------------------------------


def live(module: str, function: str, arguments: dict[str, Any]) -> None:
    """Call the function, saying what it says, and end at once."""
    pipe = os.dup(1)
    os.dup2(2, 1)  # whatever is printed goes elsewhere

    def say(what: Any) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    try:
        getattr(importlib.import_module(module), function)(say, **arguments)
    except BaseException as error:  # noqa: BLE001 - the test is told, whatever it is
        say(f"{type(error).__name__}: {error}")
    os._exit(0)
