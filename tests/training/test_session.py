"""Sessions: what hooks are told and when, how a session ends and recovers, and that all ranks do it in the same step."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import AgreementError, CheckpointNotFoundError, OutOfRangeError
from distckpt.training import hooks
from distckpt.training.agreement import Agreement
from tests.support import small_runs
from tests.support.comparing import same
from tests.support.gang import ROOT, Gang
from tests.support.training import Training
from tests.support.warm import start_script


@pytest.fixture
def training() -> Training:
    return Training()


class Told(distckpt.SessionRunHook):
    """Writes down what it is told; asks for a stop where it is told to."""

    def __init__(self, told: list[str], name: str = "", stops: str = "") -> None:
        self.told, self.name, self.stops = told, name, stops

    def note(self, what: str) -> bool:
        self.told.append(self.name + what)
        return what == self.stops

    def begin(self) -> None:
        assert distckpt.current_session() is not None
        self.note("begin")

    def after_create_session(self, session: hooks.Session, coord: Any) -> None:
        assert isinstance(coord, distckpt.Coordinator)
        self.note("created")

    def before_run(self, run_context: distckpt.SessionRunContext) -> None:
        if self.note(f"before {run_context.session.global_step}"):
            run_context.request_stop()

    def after_run(self, run_context: distckpt.SessionRunContext, run_values: distckpt.SessionRunValues) -> None:
        if self.note(f"after {run_values.results}"):
            run_context.request_stop()

    def end(self, session: hooks.Session) -> None:
        self.note("end")

    def close(self) -> None:
        self.note("close")


def session_of(training: Training, *others: distckpt.SessionRunHook, **options: Any) -> distckpt.TrainingSession:
    """A session with these hooks and no checkpoints."""
    return distckpt.TrainingSession(others, lambda: training.at, **options)


def run_to_the_end(session: distckpt.TrainingSession, step: Callable[[], object]) -> None:
    with session:
        while not session.should_stop():
            session.run(step)


# ---- in which order ---------------------------------------------------------------------------------------------------


def test_every_hook_is_told_everything_in_order(training: Training) -> None:
    told: list[str] = []
    run_to_the_end(session_of(training, Told(told, "a "), Told(told, "b ", stops="after 2")), training.step)
    expected = ["begin", "created", "before 0", "after 1", "before 1", "after 2", "end"]
    closed = ["b close", "a close"]
    assert told == [f"{name} {what}" for what in expected for name in "ab"] + closed
    assert training.at == 2


def test_a_stop_that_was_asked_for_before_the_step_lets_the_step_run(training: Training) -> None:
    told: list[str] = []
    run_to_the_end(session_of(training, Told(told, stops="before 1")), training.step)
    assert training.at == 2
    assert told[-3:] == ["after 2", "end", "close"]


@pytest.mark.parametrize("end", [StopIteration, OutOfRangeError, type("OfATable", (OutOfRangeError,), {})])
def test_the_end_of_the_input_is_a_clean_end(training: Training, end: type[Exception]) -> None:
    told: list[str] = []

    def step() -> int:
        if training.at == 2:
            raise end
        return training.step()

    run_to_the_end(session_of(training, Told(told)), step)
    assert told[-5:] == ["before 1", "after 2", "before 2", "end", "close"], (
        "no after_run for the step that had no input"
    )


def test_the_end_of_the_input_leaves_the_body(training: Training) -> None:
    with session_of(training) as session:
        session.run(next, iter(()))
        pytest.fail("the statement after it runs")
    assert session.should_stop()


def test_an_error_ends_without_end(training: Training) -> None:
    told: list[str] = []
    with pytest.raises(ZeroDivisionError):
        run_to_the_end(session_of(training, Told(told)), lambda: 1 // 0)
    assert told == ["begin", "created", "before 0", "close"]


@pytest.mark.parametrize("where", ["begin", "created", "before 0", "after 1", "end"])
def test_an_error_in_a_hook(training: Training, where: str) -> None:
    told: list[str] = []

    class Fails(Told):
        def note(self, what: str) -> bool:
            super().note(what)
            if what == where:
                raise ZeroDivisionError
            return what == "after 1"

    with pytest.raises(ZeroDivisionError):
        run_to_the_end(session_of(training, Fails(told)), training.step)
    whole = ["begin", "created", "before 0", "after 1", "end"]
    assert told == [*whole[: whole.index(where) + 1], "close"]


def test_recreated_tells_every_hook(training: Training) -> None:
    told: list[str] = []
    loop = distckpt.HookedLoop([Told(told)], lambda: training.at)
    loop.begin()
    loop.recreated()
    loop.close()
    assert told == ["begin", "created", "created", "close"]


def test_what_a_session_refuses(training: Training) -> None:
    with pytest.raises(TypeError, match="plain int"):
        session_of(training).__class__([], 0)
    with pytest.raises(ValueError, match="restore"):
        session_of(training, recoverable=[OSError])
    with pytest.raises(RuntimeError, match="not begun"):
        session_of(training).run(training.step)
    with session_of(training) as session:
        session.request_stop()
        assert session.should_stop()
        with pytest.raises(RuntimeError, match="to stop"):
            session.run(training.step)
    with session_of(training) as session:
        session.run(training.step)
    with pytest.raises(RuntimeError, match="closed"):
        session.run(training.step)
    assert training.at == 1
    loop = distckpt.HookedLoop([], None)
    loop.begin()
    with pytest.raises(RuntimeError, match="before_step"):
        loop.after_step()
    loop.before_step()
    loop.after_step()
    with pytest.raises(RuntimeError, match="before_step"):
        loop.after_step()
    loop.close()


@pytest.mark.parametrize("step", ["tensor", "callable", "object"])
def test_the_global_step_may_be(training: Training, step: str) -> None:
    class Counter:
        def __int__(self) -> int:
            return training.at

    given: dict[str, Any] = {"tensor": training.weight[0], "callable": lambda: training.at, "object": Counter()}
    session = distckpt.TrainingSession([], given[step])
    with session:
        session.run(training.step)
        session.run(training.step)
        assert session.global_step == 2


# ---- what hooks add to a step -----------------------------------------------------------------------------------------


class Adds(distckpt.SessionRunHook):
    """Asks for something at every step."""

    def __init__(self, asks: distckpt.SessionRunArgs) -> None:
        self.asks = asks
        self.results: list[Any] = []

    def before_run(self, run_context: distckpt.SessionRunContext) -> distckpt.SessionRunArgs:
        return self.asks

    def after_run(self, run_context: distckpt.SessionRunContext, run_values: distckpt.SessionRunValues) -> None:
        self.results.append(run_values.results)


def test_each_hook_gets_what_it_fetched(training: Training) -> None:
    def at() -> int:
        return training.at

    found = [
        Adds(distckpt.SessionRunArgs(fetches)) for fetches in (None, at, [at, at], {"one": at, "more": (at, [at])})
    ]
    with session_of(training, *found) as session:
        assert session.run(lambda: -training.step()) == -1
    assert [hook.results for hook in found] == [[-1], [1], [[1, 1]], [{"one": 1, "more": (1, [1])}]]


def test_hooks_feed_arguments_to_the_step(training: Training) -> None:
    feeds = Adds(distckpt.SessionRunArgs(feed_dict={"scale": 3}))
    with session_of(training, feeds) as session:
        assert session.run(lambda x, scale=1: x * scale, 5) == 15
        with pytest.raises(RuntimeError, match="'scale' is fed to the step twice"):
            session.run(lambda x, scale=1: x * scale, 5, scale=2)
    with (
        session_of(training, feeds, Adds(feeds.asks)) as session,
        pytest.raises(RuntimeError, match="'scale' is fed to the step twice"),
    ):
        session.run(training.step)
    loop = distckpt.HookedLoop([feeds], None)
    loop.begin()
    with pytest.raises(RuntimeError, match="does not run the steps"):
        loop.before_step()
    loop.close()


def test_hooks_see_what_is_run(training: Training) -> None:
    seen: list[Any] = []

    class Sees(distckpt.SessionRunHook):
        def before_run(self, run_context: distckpt.SessionRunContext) -> None:
            seen.append(run_context.original_args)

    def step(scale: int) -> int:
        return training.step()

    with session_of(training, Sees()) as session:
        session.run(step, scale=2)
    assert seen == [distckpt.SessionRunArgs(step, {"scale": 2})]


# ---- resume and recover -----------------------------------------------------------------------------------------------


def saving(training: Training, directory: Path, **options: Any) -> distckpt.TrainingSession:
    hook = distckpt.CheckpointSaverHook(directory, save_steps=2)
    return distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint, **options)


def test_a_new_session_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    with saving(Training(), tmp_path) as session:
        for _ in range(3):
            session.run(session.checkpoint.weight.add_, 1)
            session.checkpoint.progress["step"] += 1
    training = Training()
    with saving(training, tmp_path) as session:
        assert training.at == session.global_step == 3
        for _ in range(3):
            session.run(training.step)
    assert small_runs.numbers(tmp_path)[-2:] == [5, 6]
    assert distckpt.load(f"{tmp_path}/model.ckpt-6")["weight"].tolist() == [6, 6, 6]


def test_a_step_that_is_not_part_of_the_checkpoint_is_noticed(
    tmp_path: Path, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (3, 0):
        count = [steps]
        hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=5)
        with distckpt.TrainingSession([hook], lambda: count[0], checkpoint=training.checkpoint):  # noqa: B023
            pass
    assert "the global step is 0" in caplog.text


class Lost(OSError):
    """Something that a recovery heals."""


def fails_at(training: Training, at: int, error: Exception) -> Callable[[], int]:
    """A step that leaves a mess behind and fails, once, when it gets there."""
    left = [error]

    def step() -> int:
        training.step()
        if training.at == at and left:
            training.weight.fill_(-1)
            raise left.pop()
        return training.at

    return step


def test_recovery_restores_and_runs_the_step_again(tmp_path: Path, training: Training) -> None:
    told: list[str] = []
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=2)
    with distckpt.TrainingSession(
        [hook, Told(told)], lambda: training.at, checkpoint=training.checkpoint, recoverable=[OSError]
    ) as session:
        step = fails_at(training, 4, Lost())
        assert [session.run(step) for _ in range(4)] == [1, 2, 3, 3], "the fourth went back to 2"
        assert training.weight.tolist() == [3] * 3
    assert told[:-2] == ["begin", "created", "before 0", "after 1", "before 1", "after 2", "before 2", "after 3",
                         "before 3", "created", "before 2", "after 3"]  # fmt: skip
    assert small_runs.numbers(tmp_path) == [0, 2, 3], "2 was saved again after the recovery"


def test_other_errors_are_not_recovered_from(tmp_path: Path, training: Training) -> None:
    with pytest.raises(ZeroDivisionError):
        run_to_the_end(saving(training, tmp_path, recoverable=[OSError]), fails_at(training, 3, ZeroDivisionError()))
    assert small_runs.numbers(tmp_path) == [0, 2]


def test_recovery_with_a_restore_of_ones_own(training: Training) -> None:
    restored: list[int] = []

    def restore() -> None:
        restored.append(training.at)
        training.progress["step"] = 0

    with session_of(training, restore=restore, recoverable=[Lost]) as session:
        step = fails_at(training, 2, Lost())
        assert [session.run(step), session.run(step)] == [1, 1]
    assert restored == [0, 2]


def test_recovery_needs_a_checkpoint(tmp_path: Path, training: Training) -> None:
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=5)
    loop = distckpt.HookedLoop([hook], lambda: training.at, checkpoint=training.checkpoint)
    assert hook.restore(loop) is None
    with pytest.raises(CheckpointNotFoundError):
        hook.restore(loop, recovering=True)
    hook.close()


# ---- stops from outside -----------------------------------------------------------------------------------------------


def test_a_signal_saves_and_stops(tmp_path: Path, training: Training) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def step() -> int:
        if training.at == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training.step()

    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=100)
    run_to_the_end(distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint), step)
    assert training.at == 3
    assert small_runs.numbers(tmp_path) == [0, 3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_left_alone_if_nobody_asks(training: Training) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with session_of(training, stop_signals=()):
        assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ZeroDivisionError):
        run_to_the_end(session_of(training, stop_signals=(signal.SIGUSR1, signal.SIGTERM)), lambda: 1 // 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_session_in_another_thread_says_that_it_hears_no_signals(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of(training, Told([], stops="after 2"))
    thread = threading.Thread(target=run_to_the_end, args=(session, training.step))
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert training.at == 2
    assert "main thread only" in caplog.text


def test_a_coordinators_stop_stops_the_session(training: Training) -> None:
    coord = distckpt.Coordinator()
    told: list[str] = []

    def step() -> int:
        if training.at == 1:
            coord.request_stop()
        return training.step()

    run_to_the_end(session_of(training, Told(told), coord=coord), step)
    assert told[-3:] == ["after 2", "end", "close"]
    assert not coord.joined, "it is the caller's"


def test_an_error_in_a_thread_of_a_hook_stops_the_session_and_comes_out(training: Training) -> None:
    told: list[str] = []

    class Threaded(Told):
        def after_create_session(self, session: hooks.Session, coord: Any) -> None:
            distckpt.LooperThread.loop(coord, None, lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run_to_the_end(session_of(training, Threaded(told)), training.step)
    assert "end" not in told, "an error of a thread is no clean end"


def test_an_error_in_a_thread_of_the_callers_coordinator_comes_out(training: Training) -> None:
    coord = distckpt.Coordinator()
    told: list[str] = []
    distckpt.LooperThread.loop(coord, None, lambda: 1 // 0)
    coord.wait_for_stop(20)
    with pytest.raises(ZeroDivisionError), session_of(training, Told(told), coord=coord):
        pass
    assert told == ["begin", "created", "close"]


def test_an_input_that_a_thread_has_read_to_its_end_ends_cleanly(training: Training) -> None:
    told: list[str] = []

    class Reader(Told):
        def after_create_session(self, session: hooks.Session, coord: Any) -> None:
            distckpt.LooperThread.loop(coord, None, next, args=(iter(()),))

    run_to_the_end(session_of(training, Reader(told)), training.step)
    assert told[-2:] == ["end", "close"]


def test_a_stop_that_comes_after_the_loop_has_asked_loses_nothing(tmp_path: Path, training: Training) -> None:
    with saving(training, tmp_path, stop_signals=(signal.SIGUSR1,)) as session:
        assert not session.should_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        session.run(training.step)
        assert session.should_stop()
        with pytest.raises(RuntimeError, match="is to stop"):
            session.run(training.step)
    assert small_runs.numbers(tmp_path)[-1] == training.at == 1


def test_a_session_that_is_closed_is_to_stop_whoever_has_its_coordinator(training: Training) -> None:
    coord = distckpt.Coordinator()
    with distckpt.TrainingSession([], lambda: training.at, coord=coord) as session:
        session.run(training.step)
        assert not session.should_stop()
    assert session.should_stop()
    assert not coord.should_stop(), "that one is its maker's"


def test_a_saver_that_skips_while_it_is_busy_saves_the_last_step(tmp_path: Path, training: Training) -> None:
    big = torch.zeros(30_000_000)
    checkpoint = distckpt.Checkpoint(progress=training.progress, big=big)
    with distckpt.CheckpointManager(checkpoint, tmp_path, on_busy="skip") as manager:
        hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=100, saver=manager)
        with distckpt.TrainingSession([hook], lambda: training.at) as session:
            manager.wait()
            session.run(training.step)
            assert manager.save(99) is not None
    assert small_runs.numbers(tmp_path) == [0, 99, 1]


def test_a_hook_that_is_used_again_does_not_remember_what_failed(tmp_path: Path, training: Training) -> None:
    hook = distckpt.CheckpointSaverHook(tmp_path / "run", save_steps=1)

    def session() -> distckpt.TrainingSession:
        return distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint)

    def fail(session: distckpt.TrainingSession) -> None:
        with session:
            session.run(training.step)
            hook.get_saver(session).wait()
            (tmp_path / "run").rename(tmp_path / "away")
            session.run(training.step)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(session())
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "run")
    with session() as second:
        second.run(training.step)
    assert small_runs.numbers(tmp_path / "run")[-1] == training.at


def test_an_after_save_that_an_instance_has_is_called_after_the_commit(tmp_path: Path, training: Training) -> None:
    seen = []
    listener = distckpt.CheckpointSaverListener()
    listener.after_save = lambda session, step: seen.append(small_runs.numbers(tmp_path)[-1] == step)  # type: ignore[method-assign]
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=1, listeners=[listener], save_graph_def=True)
    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        session.run(training.step)
    assert seen == [True, True]


# ---- all ranks in the same step ---------------------------------------------------------------------------------------


def test_agreements_alone() -> None:
    agreement = Agreement()
    assert agreement.any() == ()
    assert agreement.any(True, False, 1, place=7) == (True, False, True)
    assert not torch.distributed.is_initialized(), "nothing is sent"
    with pytest.raises(ValueError, match="62"):
        agreement.any(*[False] * 63)
    agreement.close()
    with pytest.raises(AgreementError, match="left"):
        agreement.any(True)
    with pytest.raises(ValueError, match="both"):
        Agreement(rank=1)
    with pytest.raises(ValueError, match="init_process_group"):
        Agreement(rank=1, world_size=2)


def test_any_ranks_wish_is_everyones(gang3: Gang) -> None:
    results = gang3.run("ranks.hooks:wishes")
    assert results[0] == {
        "each": [[[True, False, False], [False, True, False], [False, False, True]]] * 2,
        "nobody": [False] * 62,
        "everybody": [True] * 62,
        "none": [],
        "not 3": "ValueError",
    }
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("how", ["place", "count"])
def test_ranks_that_are_not_in_the_same_place_are_all_told(gang3: Gang, how: str) -> None:
    results = gang3.run("ranks.hooks:astray", how=how)
    assert all(error.startswith("AgreementError") and "do not run the same steps" in error for error in results)


@pytest.mark.parametrize("what", ["ask", "make"])
def test_a_rank_that_does_not_come_is_named_to_those_who_wait(ray_address: str, what: str) -> None:
    with Gang(3, {"RAY_ADDRESS": ray_address}) as gang:  # of its own: a group that failed is of no use any more
        results = gang.run("ranks.hooks:absent", who=1, what=what)
    assert results[1] == ""
    for rank in (0, 2):
        assert results[rank].startswith(f"AgreementError: rank {rank} gets no answer from rank 1, which has died, ")
        assert "Every rank must" in results[rank]


STOPPED = [{"steps": 3, "at": 3}] * 2


@pytest.mark.parametrize("by", ["request", "hook", "wish", "coord", "signal"])
def test_one_rank_asks_and_all_stop_after_the_same_step(gang2: Gang, by: str) -> None:
    assert gang2.run("ranks.hooks:one_asks", by=by, rank=1, at=3) == STOPPED


def test_an_input_that_ends_on_one_rank(gang2: Gang) -> None:
    """Without collectives in the step; the other rank has done the step, and hears that there is no next one."""
    assert gang2.run("ranks.hooks:input_ends", rank=1, at=3) == [
        {"after": [1, 2, 3], "error": ""},
        {"after": [1, 2, 3], "error": ""},
    ]


def test_an_input_that_ends_on_one_rank_when_the_others_have_counted_a_step(gang2: Gang) -> None:
    for told in gang2.run("ranks.hooks:input_ends", rank=1, at=3, counted=True):
        assert told["error"].startswith("AgreementError: the input has come to its end on some ranks only")


def test_a_rank_that_fails_sets_the_others_free(gang2: Gang) -> None:
    began = time.monotonic()
    failed, other = gang2.run("ranks.hooks:one_fails", rank=0, at=3)
    assert failed["error"].startswith("ZeroDivisionError")
    assert other["error"].startswith("AgreementError: rank 1 gets no answer")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("how", ["counts twice", "leaves early"])
def test_ranks_at_different_steps_are_told(gang2: Gang, how: str) -> None:
    for result in gang2.run("ranks.hooks:one_is_elsewhere", how=how):
        assert "the ranks do not run the same steps" in result["error"]
        assert result["steps"] <= 3


def test_a_session_of_many_ranks_that_is_closed_is_to_stop(gang2: Gang) -> None:
    for own_coord in (False, True):
        assert gang2.run("ranks.hooks:stops_when_closed", own_coord=own_coord) == [[False, True]] * 2


def test_recovery_is_a_decision_of_all_ranks(gang2: Gang, tmp_path: Path) -> None:
    results = gang2.run("ranks.hooks:recover", directory=str(tmp_path), rank=1, at=4)
    assert [result["at"] for result in results] == [[1, 2, 3, 3, 4]] * 2
    assert [result["weight"] for result in results] == [[4.0, 4.0]] * 2
    assert small_runs.numbers(tmp_path) == [0, 2, 4]


def test_rank_0s_clock_decides_for_all(gang2: Gang, tmp_path: Path) -> None:
    """Rank 0's clock gains a second a step. To rank 1, far ahead and in a hurry, a save is due at every step."""
    results = gang2.run("ranks.hooks:clocks", directory=str(tmp_path), save_secs=3, steps=10)
    assert results == [[0, 3, 6, 9, 10]] * 2
    assert small_runs.numbers(tmp_path) == [0, 3, 6, 9, 10]


def test_a_listener_of_one_rank_stops_all(gang2: Gang, tmp_path: Path) -> None:
    results = gang2.run("ranks.hooks:listener_stops", directory=str(tmp_path), rank=1, at=4)
    assert results == [{"steps": 4, "saved": [0, 2, 4], "late": 2}] * 2


def test_a_save_that_failed_is_raised_on_all_ranks_in_the_same_step(gang2: Gang, tmp_path: Path) -> None:
    results = gang2.run("ranks.hooks:save_fails", directory=str(tmp_path), rank=1)
    assert results[0]["at"] == results[1]["at"]
    assert "the call failed" in results[0]["error"]
    assert "the call failed" in results[1]["error"]
    assert small_runs.numbers(tmp_path) == [0, results[0]["at"] + 1], "the next save works"


def test_a_failure_that_only_one_rank_knows_of_is_raised_on_all(gang2: Gang) -> None:
    other, told = gang2.run("ranks.hooks:one_is_told", rank=1)
    assert told == "SaveError: checkpoint 7 was not saved: lost sight of the coordinator"
    assert other.startswith("SaveError: checkpoint 7 was not saved: another rank was told so")


def test_a_saver_that_knows_of_other_ranks_is_refused(gang2: Gang, tmp_path: Path) -> None:
    errors = gang2.run("ranks.hooks:saver_of_one", directory=str(tmp_path))
    assert errors == ["the saver has 1 ranks, but the session has 2"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_makes_all_save_and_stop_at_the_same_step(gang2: Gang, tmp_path: Path, rank: int) -> None:
    gang2.start("ranks.hooks:preempted", directory=str(tmp_path))
    while distckpt.latest_checkpoint(tmp_path) is None:
        time.sleep(0.01)
    gang2.kill(rank, signal.SIGTERM)
    results = [gang2.result(each) for each in range(2)]
    assert results[0] == results[1]
    last = results[0]["steps"]
    assert small_runs.numbers(tmp_path) == [0, last]
    assert not small_runs.entries(tmp_path)[-1].state.ended, "only one of them was told, and none says that it is over"
    state = distckpt.load(f"{tmp_path}/model.ckpt-{last}")
    assert state["progress"] == {"step": last}
    assert state["weight"].tolist() == [last] * 4
    with distckpt.open(f"{tmp_path}/model.ckpt-{last}") as reader:
        assert reader.verify().good


# ---- the example ------------------------------------------------------------------------------------------------------


def test_the_example_saves_and_stops_when_it_is_told_to_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "hook.py"
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with start_script(script, "--directory", stopped, "--steps", 1_000_000, "--loss", 0) as process:
        while distckpt.latest_checkpoint(stopped) is None and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.wait(30) == 0
    last = small_runs.numbers(stopped)[-1]
    assert f"ended at step {last}" in said

    monkeypatch.syspath_prepend(str(script.parent))
    example = importlib.import_module("hook")
    example.train(str(stopped), last + 5, save_steps=50, loss=0.0)
    example.train(str(whole), last + 5, save_steps=10**9, loss=0.0)
    ends = [distckpt.load(f"{folder}/model.ckpt-{last + 5}") for folder in (stopped, whole)]
    assert ends[0]["progress"]["step"] == last + 5
    assert same(ends[0]["model"], ends[1]["model"])
    capsys.readouterr()
    example.train(str(whole), last + 1000, save_steps=1, loss=1e9)
    assert capsys.readouterr().out.endswith(f"ended at step {last + 6}\n"), "the listener's wish"


def test_the_example_on_two_ranks(gang2: Gang, tmp_path: Path) -> None:
    gang2.run("ranks.hooks:example", directory=str(tmp_path), steps=7, save_steps=5, loss=0.0)
    assert small_runs.numbers(tmp_path) == [0, 5, 7]
    assert small_runs.entries(tmp_path)[-1].state.ended
    gang2.run("ranks.hooks:example", directory=str(tmp_path), steps=100, save_steps=5, loss=1e9)
    assert small_runs.numbers(tmp_path)[-2:] == [7, 12], "it went on at 7, and a listener stopped it"


# ---- stopping at a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_steps": 3}, {"last_step": 5}])
def test_a_session_stops_after_so_many_steps_or_at_a_step(training: Training, options: dict[str, int]) -> None:
    training.progress["step"] = 2
    run_to_the_end(session_of(training, distckpt.StopAtStepHook(**options)), training.step)
    assert training.at == 5


def test_a_session_that_begins_beyond_the_last_step_makes_one_more(training: Training) -> None:
    training.progress["step"] = 7
    run_to_the_end(session_of(training, distckpt.StopAtStepHook(last_step=5)), training.step)
    assert training.at == 8


def test_the_steps_to_stop_after_are_counted_once(training: Training) -> None:
    hook = distckpt.StopAtStepHook(num_steps=4)
    loop = distckpt.HookedLoop([hook], lambda: training.at)
    loop.begin()
    while not loop.should_stop():
        loop.before_step()
        training.step()
        loop.after_step()
        if training.at == 2:
            loop.recreated()
    loop.close()
    assert training.at == 4


def test_when_to_stop_must_be_said_in_one_way() -> None:
    for options in ({}, {"num_steps": 1, "last_step": 1}):
        with pytest.raises(ValueError, match="num_steps or last_step"):
            distckpt.StopAtStepHook(**options)
    with pytest.raises(RuntimeError, match="no global step"):
        distckpt.HookedLoop([distckpt.StopAtStepHook(last_step=1)], None).begin()
