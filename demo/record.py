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
    """A committed checkpoint; ``nbytes`` is the sum of its shards, ``stall`` and ``decided`` are seconds.

    ``stall`` is how long training stood still, on the slowest rank; ``decided`` is the time from the call of save until
    rank 0 knew that the checkpoint was durable and visible.
    """

    path: str
    number: int
    world_size: int
    nbytes: int
    stall: float
    decided: float

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
    """Grows with every ``look``.

    ``evaluations`` are lines of evaluation.py, the others but ``commits`` events of training.py.
    """

    folder: Path
    directory: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
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
            kinds = {"started": self.starts, "step": self.steps, "saved": self.saves, "decided": self.decisions}
            kinds[event["event"]].append(event)
        commits = list(self._new_commits())
        self.commits += commits
        evaluations = list(self._new_lines(self.evaluations_path))
        self.evaluations += evaluations
        return [*events, *commits, *evaluations]

    def digests(self, moment: str, step: int, world_size: int) -> Digests:
        """What the ranks wrote at that moment."""
        return Digests(**json.loads((self.folder / "digests" / digests_name(moment, step, world_size)).read_text()))

    def evaluation(self, commit: Commit) -> dict[str, Any] | None:
        """What the evaluation found, unless it was busy with an older one and passed this one over."""
        return next((found for found in self.evaluations if found["checkpoint"] == commit.path), None)

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
        known = {commit.path for commit in self.commits}
        for path in self._retained():
            commit = self._commit(path) if path not in known else None
            if commit is not None:
                yield commit

    def _retained(self) -> tuple[str, ...]:
        state = distckpt.get_checkpoint_state(self.directory)
        return tuple(state.all_model_checkpoint_paths) if state is not None else ()

    def _commit(self, path: str) -> Commit | None:
        """None as long as its ranks have not told all of it."""
        manifest = distckpt.open(path).manifest
        told = {"step": manifest.number, "world_size": manifest.world_size}
        stalls = [event["stall"] for event in self.saves if told.items() <= event.items()]
        decided = [event["seconds"] for event in self.decisions if told.items() <= event.items()]
        if len(stalls) < manifest.world_size or not decided:
            return None
        nbytes = sum(shard.size for shard in manifest.shards)
        return Commit(path, manifest.number, manifest.world_size, nbytes, max(stalls), decided[0])
