"""TensorFlow's CheckpointManager in plain Python, after notes on what it does: files are a dict, the clock a number.

It knows nothing of distckpt. Each write of a file gets an id of its own, so a test can tell which of several writes of
one path is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StateFile:
    """What the ``checkpoint`` file says. Paths are in save order, each with the time at which it was written."""

    latest: str
    checkpoints: tuple[tuple[str, float], ...]
    last_preserved: float


@dataclass
class Directory:
    """What outlives every manager: the state file, and the files on disk."""

    state: StateFile | None = None
    files: dict[int, str] = field(default_factory=dict)
    """Path by write id, of the writes whose content is still there."""
    newest: dict[str, int] = field(default_factory=dict)
    """The last write of each path."""
    counters: dict[int, int] = field(default_factory=dict)
    """The save counter that each write holds."""


@dataclass
class Checkpoint:
    """What is saved: nothing but the counter of saves."""

    save_counter: int = 0


class ReferenceManager:
    """``now`` tells the wall-clock time in epoch seconds, ``step`` the training step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Directory,
        now: Callable[[], float],
        max_to_keep: float | None,
        hours: float | None = None,
        name: str = "ckpt",
        step: Callable[[], int] | None = None,
        interval: int | None = None,
        last_step: int | None = None,
    ) -> None:
        self.checkpoint, self.directory, self.now = checkpoint, directory, now
        self.max_to_keep, self.hours, self.name = max_to_keep, hours, name
        self.step, self.interval, self.last_step = step, interval, last_step
        self.managed: dict[str, float] = {}
        self.latest: str | None = None
        clock = now()
        if directory.state is None:
            self.last_preserved = clock - 1.0
            return
        self.latest = directory.state.latest
        self.last_preserved = min(directory.state.last_preserved, clock)
        for path, time in directory.state.checkpoints:
            if min(time, clock) > self.last_preserved:
                self.managed[path] = min(time, clock)

    def save(self, number: int | None = None, check_interval: bool = True) -> str | None:
        if self.interval is not None:
            assert self.step is not None
            step = self.step()
            if self.last_step is not None:
                if step == self.last_step:
                    return None
                if check_interval and step < self.last_step + self.interval:
                    return None
            self.last_step = step
        self.checkpoint.save_counter += 1
        path = f"{self.name}-{self.checkpoint.save_counter if number is None else number}"
        self._write(path)
        self.managed.pop(path, None)
        self.managed[path] = self.now()
        self.latest = path
        self._sweep()
        self.directory.state = StateFile(path, tuple(self.managed.items()), self.last_preserved)
        return path

    def restore_or_initialize(self) -> str | None:
        if self.latest is None:
            return None
        self.checkpoint.save_counter = self.directory.counters[self.directory.newest[self.latest]]
        if self.interval is not None:
            assert self.step is not None
            self.last_step = self.step()
        return self.latest

    def _write(self, path: str) -> None:
        # TensorFlow overwrites a file of that path whatever it is. distckpt replaces one that is managed, but keeps one
        # that is not: it was promised to stay for ever.
        if path in self.managed:
            del self.directory.files[self.directory.newest[path]]
        write = len(self.directory.counters)
        self.directory.files[write] = path
        self.directory.newest[path] = write
        self.directory.counters[write] = self.checkpoint.save_counter

    def _sweep(self) -> None:
        if not self.max_to_keep:
            return
        while len(self.managed) > self.max_to_keep:
            path = next(iter(self.managed))
            time = self.managed.pop(path)
            if self.hours and time - self.hours * 3600.0 >= self.last_preserved:
                self.last_preserved = time
            else:
                del self.directory.files[self.directory.newest[path]]
