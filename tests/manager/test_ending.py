"""The end of training is known, not guessed: it is written by who says so, and by nobody else."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

import distckpt
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorError
from distckpt.storage import LocalStore
from tests.support.small_runs import Trainer, run, target


def ended(directory: Path) -> bool:
    return read_tail(LocalStore(directory)).state.ended


def test_a_manager_that_is_closed_for_good_says_so_and_no_other(tmp_path: Path) -> None:
    run(tmp_path, 1)
    assert not ended(tmp_path)
    with Trainer(tmp_path) as trainer:
        trainer.save(2)
        trainer.manager.close(final=True)
        trainer.manager.close()
    assert ended(tmp_path)
    run(tmp_path)
    assert not ended(tmp_path), "a later run takes it back"


def test_a_run_that_fails_does_not_look_like_an_end(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.saved(1)
    trainer.__exit__(RuntimeError, RuntimeError("a mistake"), None)
    assert not ended(tmp_path)
    with pytest.raises(CoordinatorError, match="before it could say that training is over"):
        trainer.manager.close(final=True)
    assert not ended(tmp_path)


class Steps:
    """A training whose steps are counted."""

    def __init__(self) -> None:
        self.progress = {"step": 0}
        self.checkpoint = distckpt.Checkpoint(progress=self.progress)

    def step(self) -> None:
        self.progress["step"] += 1

    def session(self, *hooks: distckpt.SessionRunHook) -> distckpt.TrainingSession:
        return distckpt.TrainingSession(hooks, lambda: self.progress["step"], checkpoint=self.checkpoint)


@pytest.mark.parametrize("how", ["its hook", "a signal", "interrupt", "an error"])
def test_a_session_says_so_if_it_came_to_its_end(tmp_path: Path, how: str) -> None:
    training = Steps()
    hooks = [distckpt.CheckpointSaverHook(tmp_path, save_steps=100), distckpt.StopAtStepHook(last_step=3)]
    with contextlib.suppress(ZeroDivisionError), training.session(*hooks) as session:
        while not session.should_stop():
            session.run(training.step)
            if how == "a signal":
                signal.raise_signal(signal.SIGTERM)
            elif how == "interrupt":
                session.interrupt()
            elif how == "an error":
                _ = 1 / 0
    assert ended(tmp_path) == (how == "its hook")


def test_a_session_with_a_manager_of_the_callers_has_it_say_so_when_it_is_closed(tmp_path: Path) -> None:
    training = Steps()
    for more in (False, True):
        with distckpt.CheckpointManager(training.checkpoint, tmp_path) as manager:
            hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=100, saver=manager)
            with training.session(hook) as session:
                session.run(training.step)
            assert not ended(tmp_path)
            if more:
                manager.save(1000)
        assert ended(tmp_path) == (not more)


def test_a_target_that_only_restores_takes_it_back_and_a_reader_does_not(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        trainer.manager.close(final=True)
    distckpt.load(tmp_path)
    assert ended(tmp_path)
    with distckpt.CheckpointManager(target(), tmp_path) as manager:
        manager.restore()
    assert not ended(tmp_path)
