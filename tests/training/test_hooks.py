"""The timer, and the hook that saves: when, in which order with its listeners, and what happens when something fails."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt.errors import CoordinatorError
from distckpt.storage import LocalStore
from distckpt.testing.faulty import Fault, FaultOn, FaultyStore
from distckpt.training import hooks
from tests.support import small_runs
from tests.support.training import Training


@pytest.fixture
def training() -> Training:
    return Training()


class Recorder(distckpt.CheckpointSaverListener):
    """Writes down what it is told, and what is committed by then; stops or fails when it is told to."""

    def __init__(self, name: str, told: list[Any], directory: Path, **options: Any) -> None:
        self.name, self.told, self.directory, self.options = name, told, directory, options

    def note(self, what: str, *more: Any) -> None:
        self.told.append((self.name, what, *more))
        if self.options.get("fails") == (what, *more):
            raise ZeroDivisionError(what)

    def begin(self) -> None:
        self.note("begin")

    def before_save(self, session: hooks.Session, global_step_value: int) -> None:
        self.note("before", global_step_value)

    def after_save(self, session: hooks.Session, global_step_value: int) -> bool:
        assert distckpt.latest_checkpoint(self.directory) == f"{self.directory}/model.ckpt-{global_step_value}"
        self.note("after", global_step_value)
        return global_step_value in self.options.get("stops", ())

    def end(self, session: hooks.Session, global_step_value: int) -> None:
        self.note("end", global_step_value)


class ByHand:
    """Drives one hook, without a session that creates it: begin, steps, end."""

    def __init__(self, hook: distckpt.CheckpointSaverHook, training: Training) -> None:
        self.hook, self.training = hook, training
        self.session = distckpt.HookedLoop([], lambda: training.at, checkpoint=training.checkpoint)
        self.session.begin()
        with hooks.beginning(self.session):
            hook.begin()

    def steps(self, count: int) -> list[bool]:
        """For each step whether the hook asked to stop."""
        asked = []
        for _ in range(count):
            context = distckpt.SessionRunContext(self.session)
            self.hook.before_run(context)
            self.training.step()
            self.hook.after_run(context, distckpt.SessionRunValues())
            asked.append(context.stop_requested)
        return asked


def train(hook: distckpt.CheckpointSaverHook, training: Training, steps: int | None = None) -> None:
    """A session that runs so many steps, else until it is to stop."""
    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        while not session.should_stop() and training.at != steps:
            session.run(training.step)


def step_on(loop: distckpt.HookedLoop, training: Training, forever: bool = False) -> None:
    """One step of somebody else's loop, or steps until one raises."""
    while True:
        loop.before_step()
        training.step()
        loop.after_step()
        if not forever:
            return


def saved(directory: Path) -> list[int]:
    return small_runs.numbers(directory)


def state_at(directory: Path, number: int) -> dict[str, Any]:
    return distckpt.load(f"{directory}/model.ckpt-{number}")


# ---- the timer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"every_secs": 1.0, "every_steps": 1}, {"every_secs": None}])
def test_timer_takes_seconds_or_steps(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every_secs or every_steps"):
        distckpt.SecondOrStepTimer(**given)


def test_timer_by_steps() -> None:
    timer = distckpt.SecondOrStepTimer(every_steps=3)
    assert timer.last_triggered_step() is None
    assert timer.should_trigger_for_step(17)
    assert timer.should_trigger_for_step(17), "asking changes nothing"
    assert timer.update_last_triggered_step(17) == (None, None)
    assert [step for step in range(15, 30) if timer.should_trigger_for_step(step)] == list(range(20, 30))
    assert timer.update_last_triggered_step(22)[1] == 5
    assert not timer.should_trigger_for_step(24), "counted from when it happened, not from when it was due"
    assert timer.last_triggered_step() == 22
    timer.reset()
    assert timer.last_triggered_step() is None
    assert timer.should_trigger_for_step(22)
    assert timer.update_last_triggered_step(22) == (None, None)


def test_timer_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    timer = distckpt.SecondOrStepTimer(every_secs=1.5)
    assert timer.should_trigger_for_step(1)
    assert timer.update_last_triggered_step(1) == (None, None)
    clock[0] = 101.4
    assert not timer.should_trigger_for_step(2)
    clock[0] = 101.5
    assert timer.should_trigger_for_step(2)
    assert not timer.should_trigger_for_step(1), "never twice at one step"
    clock[0] = 102.0
    assert timer.update_last_triggered_step(5) == (2.0, 4)
    clock[0] = 103.4
    assert not timer.should_trigger_for_step(6), "there is no catching up"


def test_timer_by_steps_tells_the_seconds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [7.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    timer = distckpt.SecondOrStepTimer(every_steps=2)
    timer.update_last_triggered_step(0)
    clock[0] = 9.5
    assert timer.update_last_triggered_step(2) == (2.5, 2)


# ---- what the hook takes ----------------------------------------------------------------------------------------------


def test_the_arguments_and_defaults_of_tensorflow() -> None:
    signature = inspect.signature(distckpt.CheckpointSaverHook)
    assert {name: parameter.default for name, parameter in signature.parameters.items()} == {
        "checkpoint_dir": inspect.Parameter.empty,
        "save_secs": None,
        "save_steps": None,
        "saver": None,
        "checkpoint_basename": "model.ckpt",
        "scaffold": None,
        "listeners": None,
        "save_graph_def": False,
    }
    assert list(inspect.signature(distckpt.SecondOrStepTimer).parameters) == ["every_secs", "every_steps"]


def test_wrong_arguments(tmp_path: Path, training: Training) -> None:
    with distckpt.CheckpointManager(training.checkpoint, tmp_path) as manager:
        with pytest.raises(ValueError, match="a saver or a scaffold"):  # comes first, as in TensorFlow
            distckpt.CheckpointSaverHook(tmp_path, saver=manager, scaffold=distckpt.Scaffold())
        with pytest.raises(ValueError, match="a saver or a scaffold"):
            distckpt.CheckpointSaverHook(tmp_path, 1, 1, saver=manager, scaffold=distckpt.Scaffold(manager))
    with pytest.raises(ValueError, match="give every_secs or every_steps"):
        distckpt.CheckpointSaverHook(tmp_path)
    with pytest.raises(ValueError, match="not both"):
        distckpt.CheckpointSaverHook(tmp_path, save_secs=1, save_steps=1)


def test_no_global_step(tmp_path: Path) -> None:
    told: list[Any] = []
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=1, listeners=[Recorder("a", told, tmp_path)])
    loop = distckpt.HookedLoop([hook], None)
    with pytest.raises(RuntimeError, match="no global step"):
        loop.begin()
    loop.close()
    with pytest.raises(RuntimeError, match="no session"):
        hook.begin()
    assert told == []


def test_nothing_to_save_is_noticed_when_it_is_needed(tmp_path: Path, training: Training) -> None:
    bare = distckpt.HookedLoop([], lambda: 0)
    for hook in (
        distckpt.CheckpointSaverHook(tmp_path, save_steps=1),
        distckpt.CheckpointSaverHook(tmp_path, save_steps=1, scaffold=distckpt.Scaffold()),
    ):
        with pytest.raises(RuntimeError, match="nothing to save"):
            hook.after_create_session(bare, None)


def test_a_saver_of_another_directory_is_refused(tmp_path: Path, training: Training) -> None:
    with distckpt.CheckpointManager(training.checkpoint, tmp_path / "one") as manager:
        hook = distckpt.CheckpointSaverHook(tmp_path / "other", save_steps=1, saver=manager)
        with pytest.raises(ValueError, match="other"):
            hook.get_saver(distckpt.HookedLoop([], None))


@pytest.mark.parametrize("through", ["saver", "scaffold"])
def test_a_saver_that_was_given_saves_and_stays_open(tmp_path: Path, training: Training, through: str) -> None:
    with distckpt.CheckpointManager(training.checkpoint, tmp_path, max_to_keep=2) as manager:
        scaffold = distckpt.Scaffold()
        given: Any = {"saver": manager} if through == "saver" else {"scaffold": scaffold}
        hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=1, checkpoint_basename="unused", **given)
        scaffold.saver = manager
        with distckpt.TrainingSession([hook], lambda: training.at, restore=lambda: None) as session:
            for _ in range(3):
                session.run(training.step)
        assert manager.checkpoints[-2:] == [f"{tmp_path}/ckpt-2", f"{tmp_path}/ckpt-3"]
        assert manager.save(9).result() == f"{tmp_path}/ckpt-9"


# ---- when it saves ----------------------------------------------------------------------------------------------------


def test_a_created_session_saves_0_2_4_and_the_last_step(tmp_path: Path, training: Training) -> None:
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=2)
    train(hook, training, 5)
    assert saved(tmp_path) == [0, 2, 4, 5]
    for number in (0, 2, 4, 5):
        state = state_at(tmp_path, number)
        assert state["progress"] == {"step": number}
        assert state["weight"].tolist() == [number] * 3


def test_driven_by_hand_it_saves_1_3_5(tmp_path: Path, training: Training) -> None:
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=2)
    by_hand = ByHand(hook, training)
    by_hand.steps(6)
    hook.get_saver(by_hand.session).wait()
    assert saved(tmp_path) == [1, 3, 5]
    hook.end(by_hand.session)
    assert saved(tmp_path) == [1, 3, 5, 6]
    hook.close()


def test_by_the_clock(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start + 0.75 * training.at)
    hook = distckpt.CheckpointSaverHook(tmp_path, save_secs=2)
    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        for _ in range(6):
            session.run(training.step)
        assert [path.rpartition("-")[2] for path in hook.get_saver(session).checkpoints][:2] == ["0", "3"]
    assert saved(tmp_path) == [0, 3, 6]


def test_a_step_that_takes_longer_than_the_interval(tmp_path: Path, training: Training) -> None:
    """The step may grow by more than one between two calls: a save comes as soon as it is due."""

    def three_steps() -> None:
        for _ in range(3):
            training.step()

    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=5)
    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        for _ in range(5):
            session.run(three_steps)
    assert saved(tmp_path) == [0, 6, 12, 15]


# ---- listeners --------------------------------------------------------------------------------------------------------


def test_listeners_in_order_and_all_of_them(tmp_path: Path, training: Training) -> None:
    told: list[Any] = []
    listeners = [Recorder("a", told, tmp_path, stops={0, 4, 5}), Recorder("b", told, tmp_path)]
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=2, listeners=listeners)
    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        assert not session.should_stop(), "what a listener says when the session is created has no effect"
        while not session.should_stop():
            session.run(training.step)
    assert training.at == 4, "the first listener's wish is not lost by the second one's answer"

    def around(step: int) -> list[Any]:
        return [("a", "before", step), ("b", "before", step), ("a", "after", step), ("b", "after", step)]

    begun, ended = [("a", "begin"), ("b", "begin")], [("a", "end", 4), ("b", "end", 4)]
    assert told == [*begun, *around(0), *around(2), *around(4), *ended]


def test_end_saves_what_is_not_saved_and_tells_every_listener(tmp_path: Path, training: Training) -> None:
    told: list[Any] = []
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=3, listeners=[Recorder("a", told, tmp_path)])
    train(hook, training, 1)
    assert told[-3:] == [("a", "before", 1), ("a", "after", 1), ("a", "end", 1)]


@pytest.mark.parametrize(
    ("fails", "told_last", "exists"),
    [
        (("before", 2), [("a", "before", 2)], False),
        (("after", 2), [("a", "before", 2), ("b", "before", 2), ("a", "after", 2)], True),
    ],
)
def test_a_listener_that_fails(
    tmp_path: Path, training: Training, fails: tuple[Any, ...], told_last: list[Any], exists: bool
) -> None:
    told: list[Any] = []
    listeners = [Recorder("a", told, tmp_path, fails=fails), Recorder("b", told, tmp_path)]
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=2, listeners=listeners)
    with pytest.raises(ZeroDivisionError):
        train(hook, training)
    assert training.at == 2
    assert told[-len(told_last) :] == told_last
    assert not any(what == "end" for _, what, *_ in told)
    assert (2 in saved(tmp_path)) == exists


class OnlyBefore(distckpt.CheckpointSaverListener):
    """Does not care what becomes of the save."""

    def before_save(self, session: hooks.Session, global_step_value: int) -> None:
        assert global_step_value == 0


@pytest.mark.parametrize("listeners", [[], [OnlyBefore()]])
def test_only_an_after_save_makes_training_wait(tmp_path: Path, training: Training, listeners: list[Any]) -> None:
    store = Blocked(tmp_path)
    with small_runs.mounting():
        hook = distckpt.CheckpointSaverHook(small_runs.mount(store), save_steps=1, listeners=listeners)
        loop = distckpt.HookedLoop([hook], lambda: training.at, checkpoint=training.checkpoint)
        loop.begin()
        assert saved(tmp_path) == [], "begin has come back while the shard cannot be written"
        store.blocked = False
        loop.end()
        loop.close()
    assert saved(tmp_path) == [0]


class Blocked(LocalStore):
    """Shards cannot be written while it is blocked."""

    blocked = True

    def put_unique(self, path: str, *args: Any, **kwargs: Any) -> Any:
        while path.startswith("model.ckpt") and self.blocked:
            time.sleep(0.001)
        return super().put_unique(path, *args, **kwargs)


# ---- saves that fail --------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[FaultyStore, str]]:
    store = FaultyStore(LocalStore(tmp_path))
    with small_runs.mounting():
        yield store, small_runs.mount(store)


def broken(number: int) -> FaultOn:
    """Every shard of that checkpoint fails."""
    return FaultOn("put_unique", Fault.BEFORE, f"model.ckpt-{number}/")


def test_a_save_that_failed_is_raised_by_one_of_the_next_steps(
    tmp_path: Path, training: Training, faulty: tuple[FaultyStore, str]
) -> None:
    store, url = faulty
    store.script = broken(2)
    hook = distckpt.CheckpointSaverHook(url, save_steps=2)
    loop = distckpt.HookedLoop([hook], lambda: min(training.at, 3), checkpoint=training.checkpoint)
    loop.begin()
    with pytest.raises(distckpt.errors.DistckptError, match="the call failed"):
        step_on(loop, training, forever=True)  # the step stays 3, so no later save is due that could raise it
    assert training.at >= 3
    step_on(loop, training)  # who catches it can go on: it is raised once
    loop.end()
    loop.close()
    assert saved(tmp_path) == [0, 3]


def test_a_failed_save_with_listeners_is_raised_at_once(
    tmp_path: Path, training: Training, faulty: tuple[FaultyStore, str]
) -> None:
    store, url = faulty
    store.script = broken(2)
    told: list[Any] = []
    hook = distckpt.CheckpointSaverHook(url, save_steps=2, listeners=[Recorder("a", told, tmp_path)])
    with pytest.raises(distckpt.errors.DistckptError, match="the call failed"):
        train(hook, training)
    assert training.at == 2
    assert told[-1] == ("a", "before", 2)


@pytest.mark.parametrize("more", [0, 1])
def test_end_saves_the_last_step_though_a_save_has_failed(
    tmp_path: Path, training: Training, faulty: tuple[FaultyStore, str], more: int
) -> None:
    """That of an earlier step, or that of the very same: TensorFlow's hook takes such a step for saved."""
    store, url = faulty
    store.script = broken(2)
    hook = distckpt.CheckpointSaverHook(url, save_steps=2)
    loop = distckpt.HookedLoop([hook], lambda: training.at, checkpoint=training.checkpoint)
    loop.begin()
    step_on(loop, training)
    step_on(loop, training)
    while not any(call.fault for call in store.calls):
        time.sleep(0.001)
    store.heal()
    training.progress["step"] += more
    loop.end()
    loop.close()
    assert saved(tmp_path) == [0, 2 + more]


def test_end_raises_if_the_last_save_fails(tmp_path: Path, training: Training, faulty: tuple[FaultyStore, str]) -> None:
    store, url = faulty
    store.script = broken(1)
    hook = distckpt.CheckpointSaverHook(url, save_steps=5)
    with pytest.raises(distckpt.errors.DistckptError, match="the call failed"):
        train(hook, training, 1)
    assert saved(tmp_path) == [0]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_the_manager_that_it_made_is_closed(tmp_path: Path, training: Training, error: type[Exception] | None) -> None:
    hook = distckpt.CheckpointSaverHook(tmp_path, save_steps=1)
    session = distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint)
    try:
        with session:
            manager = hook.get_saver(session)
            session.run(training.step)
            if error is not None:
                raise error
    except ZeroDivisionError:
        assert error is not None
    with pytest.raises(CoordinatorError, match="closed"):
        manager.save(1)
    assert saved(tmp_path) == [0, 1], "a save in flight is finished also after an error"
