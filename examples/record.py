"""What the files of a run say: events of the ranks, evaluations, and what has been committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from witness import digests_name

import distckpt


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed checkpoint; ``time`` is when it was, in epoch seconds, ``nbytes`` the sum of its shards."""

    path: str
    number: int
    time: float
    world_size: int
    nbytes: int

    @property
    def name(self) -> str:
        """``ckpt-40``."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Digests:
    """Of every tensor by key, and the plain values, at one moment."""

    tensors: dict[str, str]
    values: dict[str, Any]


@dataclass
class Record:
    """Grows with every ``look``: ``steps`` and ``savings`` are events of train.py, evaluations lines of evaluate.py."""

    folder: Path
    directory: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    savings: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    _read: dict[Path, int] = field(default_factory=dict)

    @property
    def events_path(self) -> Path:
        """Where the ranks write their events."""
        return self.folder / "events.jsonl"

    @property
    def evaluations_path(self) -> Path:
        """Where the evaluation writes its results."""
        return self.folder / "evaluations.jsonl"

    def look(self) -> list[dict[str, Any] | Commit]:
        """Read on, and return what is new: events, evaluations (without "event"), commits."""
        events = list(self._new_lines(self.events_path))
        for event in events:
            {"step": self.steps, "saving": self.savings, "started": self.starts}[event["event"]].append(event)
        commits = list(self._new_commits())
        self.commits += commits
        evaluations = list(self._new_lines(self.evaluations_path))
        self.evaluations += evaluations
        return [*events, *commits, *evaluations]

    def digests(self, moment: str, step: int, world_size: int) -> Digests:
        """What train.py wrote at that moment."""
        return Digests(**json.loads((self.folder / "digests" / digests_name(moment, step, world_size)).read_text()))

    def stall(self, commit: Commit) -> float:
        """Seconds that training stood still for this save, on the slowest rank."""
        return max(float(saving["stall"]) for saving in self._savings_of(commit))

    def until_commit(self, commit: Commit) -> float:
        """Seconds from the first rank's call of save to the entry in the log."""
        return commit.time - min(float(saving["called"]) for saving in self._savings_of(commit))

    def evaluation(self, commit: Commit) -> dict[str, Any] | None:
        """What the evaluation found, unless it was busy with an older one and passed this one over."""
        return next((found for found in self.evaluations if found["checkpoint"] == commit.path), None)

    def _savings_of(self, commit: Commit) -> list[dict[str, Any]]:
        return [
            saving
            for saving in self.savings
            if (saving["step"], saving["world_size"]) == (commit.number, commit.world_size)
        ]

    def _new_lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written; next time
                self._read[path] = self._read.get(path, 0) + len(line)
                yield json.loads(line)

    def _new_commits(self) -> Iterator[Commit]:
        try:
            state = distckpt.get_checkpoint_state(self.directory)
        except ValueError:
            return  # the first checkpoint has yet to come
        if state is None:
            return
        known = {commit.path for commit in self.commits}
        for path, time in zip(state.all_model_checkpoint_paths, state.all_model_checkpoint_timestamps, strict=True):
            if path not in known:
                manifest = distckpt.open(path).manifest
                nbytes = sum(shard.size for shard in manifest.shards)
                commit = Commit(path, manifest.number, time, manifest.world_size, nbytes)
                if len(self._savings_of(commit)) == commit.world_size:  # else it was faster than its ranks' events
                    yield commit
