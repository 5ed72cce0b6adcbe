"""The whole CheckpointManager against a model of TensorFlow's: random saves, restarts, restores and clocks that jump."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import distckpt
from distckpt.format import names
from distckpt.storage import Store, open_store
from distckpt.testing.observing import everything
from tests.support import reference_manager
from tests.support.part import examples
from tests.support.reference_manager import ReferenceManager, StateFile
from tests.support.small_runs import until


@dataclass(frozen=True)
class Make:
    """A manager is made; with ``fresh`` by another process, which has counted no saves."""

    max_to_keep: float | None = 5
    hours: float | None = None
    name: str = "ckpt"
    interval: int | None = None
    last_step: int | None = None
    fresh: bool = True


@dataclass(frozen=True)
class Save:
    """Training goes on for so many seconds and steps, then calls ``save``."""

    seconds: float = 60.0
    steps: int = 1
    number: int | None = None
    check_interval: bool = True


@dataclass(frozen=True)
class Jump:
    """The clock is set."""

    seconds: float


@dataclass(frozen=True)
class Restore:
    """Training calls ``restore_or_initialize``."""


Step = Make | Save | Jump | Restore


class World:
    """One directory with a manager and with the model of one. Both see the same clock and the same training step."""

    def __init__(self, url: str) -> None:
        self.store: Store = open_store(url)
        self.now = 100_000.0
        self.step = torch.tensor(0)
        self.directory = reference_manager.Directory()
        self.manager: distckpt.CheckpointManager | None = None
        self.inits = self.expected_inits = 0

    def do(self, step: Step) -> None:
        """Do it with both, and compare what can be seen at once."""
        match step:
            case Make():
                self.close()
                self._make(step)
            case Save():
                self._save(step)
            case Jump():
                self.now += step.seconds
            case Restore():
                self._restore()
        self._compare()

    def close(self) -> None:
        """End the manager; then everything must have been done."""
        if self.manager is not None:
            self.manager.close()
            assert self.files() == self.expected_files()
            assert self.state_file() == self.directory.state

    def _make(self, step: Make) -> None:
        if step.fresh or self.manager is None:
            self.state = {"write": torch.tensor(-1)}
            self.checkpoint, self.expected_checkpoint = (
                distckpt.Checkpoint(s=self.state),
                reference_manager.Checkpoint(),
            )
        self.expected = ReferenceManager(
            self.expected_checkpoint,
            self.directory,
            lambda: self.now,
            step.max_to_keep,
            step.hours,
            step.name,
            lambda: int(self.step),
            step.interval,
            step.last_step,
        )
        self.manager = distckpt.CheckpointManager(
            self.checkpoint,
            self.store.url,
            step.max_to_keep,
            step.hours,
            step.name,
            self.step,
            step.interval,
            self._init,
            step.last_step,
        )

    def _init(self) -> None:
        self.inits += 1

    def _save(self, step: Save) -> None:
        self.now += step.seconds
        self.step += step.steps
        self.state["write"].fill_(len(self.directory.counters))
        pending = self.manager.save(_dressed(step.number), step.check_interval)
        path = self.expected.save(step.number, step.check_interval)
        assert (None if pending is None else pending.result(60)) == self.full(path)
        # The state file is written, and files are deleted, after the save was answered.
        until(lambda: (self.state_file(), self.files()) == (self.directory.state, self.expected_files()))

    def _restore(self) -> None:
        path = self.expected.restore_or_initialize()
        assert self.manager.restore_or_initialize() == self.full(path)
        self.expected_inits += path is None
        if path is not None:
            assert int(self.state["write"]) == self.directory.newest[path]

    def _compare(self) -> None:
        assert self.manager.checkpoints == [self.full(path) for path in self.expected.managed]
        assert self.manager.latest_checkpoint == self.full(self.expected.latest)
        assert distckpt.latest_checkpoint(self.store.url) == self.full(self.expected.latest)
        assert self.checkpoint.save_counter == self.expected_checkpoint.save_counter
        assert self.inits == self.expected_inits
        assert self.state_file() == self.directory.state
        assert self.files() == self.expected_files()

    def full(self, path: str | None) -> str | None:
        """What ``path`` is called from outside."""
        return None if path is None else f"{self.store.url}/{path}"

    def state_file(self) -> StateFile | None:
        """What the state file says."""
        state = distckpt.get_checkpoint_state(self.store.url)
        if state is None:
            return None
        assert state.model_checkpoint_path == state.all_model_checkpoint_paths[-1]
        paths = [path.removeprefix(f"{self.store.url}/") for path in state.all_model_checkpoint_paths]
        checkpoints = zip(paths, state.all_model_checkpoint_timestamps, strict=True)
        return StateFile(paths[-1], tuple(checkpoints), state.last_preserved_timestamp)

    def files(self) -> Counter[str]:
        """How many attempts at each checkpoint have any file left."""
        folders = [folder for folder in self.store.folders("") if names.parse_checkpoint(folder) is not None]
        return Counter(
            folder for folder in folders for _ in self.store.folders(folder) if everything(self.store, folder)
        )

    def expected_files(self) -> Counter[str]:
        """The same by the model."""
        return Counter(self.directory.files.values())

    def check_contents(self) -> None:
        """Each managed checkpoint is whole, and holds what was saved last as that."""
        for path in self.expected.managed:
            with distckpt.open(self.full(path)) as reader:
                assert reader.verify().damages == ()
                assert int(reader.tensor("s.write")) == self.directory.newest[path]


def _dressed(number: int | None) -> object:
    """The number as one of the types that it may have."""
    kinds: list[Callable[[int], object]] = [int, np.int64, torch.tensor, float]
    return None if number is None else kinds[number % len(kinds)](number)


def play(url: str, steps: Sequence[Step]) -> None:
    """Do all of it, in the order given."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(url)
        patch.setattr(time, "time", lambda: world.now)
        try:
            for step in steps:
                world.do(step)
            world.close()
            world.check_contents()
        finally:
            if world.manager is not None:
                world.manager.close()


HOUR = 3600.0
MAKES = st.builds(
    Make,
    st.sampled_from([None, 1, 2, 2.5, 3]),
    st.sampled_from([None, 0, 0.5, 1.0, 1.5]),
    st.sampled_from(["ckpt", "ckpt", "other"]),
    st.sampled_from([None, None, 0, 1, 3]),
    st.sampled_from([None, None, 2]),
    st.booleans(),
)
SAVES = st.builds(
    Save,
    st.sampled_from([0.0, 1.0, 600.0, HOUR / 2 - 1, HOUR / 2, HOUR, 5000.0]),
    st.sampled_from([0, 1, 1, 2, -1]),
    st.sampled_from([None, None, None, 0, 1, 2, 7]),
    st.sampled_from([True, True, False]),
)
JUMPS = st.builds(Jump, st.sampled_from([-100_000.0, -2 * HOUR, -HOUR / 2, -1.0, HOUR, 90_000.0]))
STEPS = st.lists(st.one_of(SAVES, SAVES, SAVES, MAKES, JUMPS, st.builds(Restore)), max_size=14)


@settings(max_examples=examples(60))
@given(first=MAKES, steps=STEPS)
@example(  # the clock goes back, and nobody saves meanwhile
    first=Make(2), steps=[Save(), Save(), Jump(-90_000.0), Make(1), Jump(90_000.0), Make(1), Save()]
)
@example(  # the newest is older, by its time, than one that is still managed
    first=Make(None),
    steps=[Save(), Jump(-2 * HOUR), Save(), Jump(HOUR), Make(None), Restore(), Save(), Make(1), Save()],
)
@example(  # a number that was preserved is saved again, and goes again
    first=Make(1, 0.5), steps=[Save(HOUR, number=7), Save(number=1), Save(number=7), Save(number=2), Restore()]
)
@example(  # made for the first time, to no effect, long before the first save
    first=Make(1, 1.0), steps=[Jump(90_000.0), Make(1, 1.0), Save(1.0), Save(1.0), Save(1.0)]
)
@example(first=Make(1, 0.5), steps=[Save(HOUR / 2)] * 5)  # exactly as old as it takes
@example(  # several are due at once, under another name
    first=Make(None), steps=[Save(), Save(), Save(HOUR), Save(), Make(1, 0.5, "other"), Save(), Save()]
)
def test_the_manager_does_what_the_model_does(first: Make, steps: list[Step]) -> None:
    play(f"memory://{uuid.uuid4().hex}", [first, *steps])


@settings(max_examples=6)
@given(first=MAKES, steps=STEPS)
def test_so_it_does_on_disk(first: Make, steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        play(f"{folder}/run", [first, *steps])
