"""What ranks do with hooks. Every function runs on all ranks of a gang; arguments and results are JSON."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DistckptError, SaveError
from distckpt.rank.pending import PendingSave, progress_of
from distckpt.storage import LocalStore
from distckpt.testing.faulty import Fault, FaultOn, FaultyStore
from distckpt.training import hooks
from distckpt.training.agreement import Agreement
from tests.support.gang import ROOT
from tests.support.swapped import write_to


class Training:
    """``step`` counts, and the weight grows with it; the weight is the same on every rank, the rank's own is not."""

    def __init__(self) -> None:
        self.progress = {"step": 0}
        self.weight = torch.zeros(4)
        self.steps = 0
        self.checkpoint = distckpt.Checkpoint(
            progress=self.progress, weight=self.weight, own=distckpt.PerRank({"rank": dist.get_rank()})
        )

    @property
    def at(self) -> int:
        return self.progress["step"]

    def step(self) -> int:
        self.steps += 1
        self.progress["step"] += 1
        self.weight += 1
        return self.at


class Asks(distckpt.SessionRunHook):
    """One rank's hook asks to stop when it gets there."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank, self.at = rank, at

    def after_run(self, run_context: distckpt.SessionRunContext, run_values: distckpt.SessionRunValues) -> None:
        if run_context.session.rank == self.rank and run_context.session.global_step == self.at:
            run_context.request_stop()


class Wishes(Asks):
    """One rank has a wish when it gets there; on all ranks it is this that asks to stop, and nobody without it."""

    def wishes(self, run_context: distckpt.SessionRunContext) -> tuple[bool, ...]:
        there = run_context.session.global_step == self.at
        return False, there and run_context.session.rank == self.rank

    def after_run(self, run_context: distckpt.SessionRunContext, run_values: distckpt.SessionRunValues) -> None:
        if run_context.agreed == (False, True):
            run_context.request_stop()


class NothingFirst(distckpt.CheckpointSaverHook):
    """Does not save at the beginning, so that nothing is saved at all."""

    def after_create_session(self, session: hooks.Session, coord: Any) -> None:
        self._timer.update_last_triggered_step(session.global_step)


def wishes() -> dict[str, Any]:
    """What is agreed when each rank has another wish, all have all, and nobody has any; two groups at a time."""
    rank, size = dist.get_rank(), dist.get_world_size()
    both = [Agreement(), Agreement(rank, size)]
    each = [[agreement.any(*(rank == asked and of == asked for of in range(size))) for asked in range(size)]
            for agreement in both]  # fmt: skip
    nobody, everybody = both[0].any(*[False] * 62), both[0].any(*[rank == 1] * 62, place=10**18 << 2)
    none = both[0].any()
    for agreement in both:
        agreement.close()
    return {
        "each": each,
        "nobody": nobody,
        "everybody": everybody,
        "none": none,
        "not 3": _error(lambda: Agreement(0, 7)),
    }


def astray(how: str) -> str:
    """The last rank asks elsewhere, or has one wish more."""
    agreement, astray = Agreement(), dist.get_rank() == dist.get_world_size() - 1
    found = _error(
        lambda: agreement.any(False, *[False] * (astray and how == "count"), place=4 + (astray and how == "place"))
    )
    agreement.close()
    return found


def absent(who: int, what: str) -> str:
    """One rank does not ask, or makes no Agreement; what the others are told."""
    found = ""
    if what == "ask":
        agreement = Agreement(timeout=2)
        if dist.get_rank() != who:
            found = _error(lambda: agreement.any(True, place=4))
        dist.barrier()
        agreement.close()
        return found
    if dist.get_rank() != who:
        found = _error(lambda: Agreement(timeout=2))
    dist.barrier()
    return found


def one_asks(by: str, rank: int, at: int) -> dict[str, Any]:
    """One rank asks, in its own way, for a stop while it runs a step."""
    training, coord = Training(), distckpt.Coordinator()
    asking = {"hook": [Asks(rank, at)], "wish": [Wishes(rank, at), Wishes(-1, 0)]}.get(by, [])

    def step() -> None:
        if dist.get_rank() == rank and training.step() == at:
            if by == "request":
                session.request_stop()
            elif by == "coord":
                coord.request_stop()
            elif by == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
        elif dist.get_rank() != rank:
            training.step()

    with distckpt.TrainingSession(asking, lambda: training.at, coord=coord) as session:
        while not session.should_stop():
            session.run(step)
    return {"steps": training.steps, "at": training.at}


def input_ends(rank: int, at: int, counted: bool = False) -> dict[str, Any]:
    """One rank has no input for the step after ``at``."""
    training, after = Training(), []

    class Notes(distckpt.SessionRunHook):
        def after_run(self, run_context: distckpt.SessionRunContext, run_values: distckpt.SessionRunValues) -> None:
            after.append(run_values.results)

    def step() -> int:
        if dist.get_rank() == rank and training.steps == at:
            raise StopIteration
        training.steps += 1
        return training.steps

    def run() -> None:
        with distckpt.TrainingSession([Notes()], (lambda: training.steps) if counted else None) as session:
            while not session.should_stop():
                session.run(step)

    return {"after": after, "error": _error(run)}


def one_fails(rank: int, at: int) -> dict[str, Any]:
    """One rank's step raises."""
    training = Training()

    def step() -> None:
        if training.step() == at and dist.get_rank() == rank:
            raise ZeroDivisionError

    def run() -> None:
        with distckpt.TrainingSession([], lambda: training.at) as session:
            while not session.should_stop():
                session.run(step)

    return {"error": _error(run)}


def one_is_elsewhere(how: str) -> dict[str, Any]:
    """Rank 1 counts one step twice, or leaves the loop one step before the others."""
    training, rank = Training(), dist.get_rank()

    def step() -> None:
        training.step()
        if how == "counts twice" and training.at == 2:
            training.progress["step"] += rank

    def run() -> None:
        with distckpt.TrainingSession([], lambda: training.at) as session:
            while training.at < (3 - rank if how == "leaves early" else 100):
                session.run(step)

    return {"error": _error(run), "steps": training.steps}


def stops_when_closed(own_coord: bool) -> list[bool]:
    """Leave a session after a step that nobody took for the last; whether it is to stop before and after that."""
    training, coord = Training(), distckpt.Coordinator()
    given = {"coord": coord} if own_coord else {}
    with distckpt.TrainingSession([], lambda: training.at, **given) as session:  # type: ignore[arg-type]
        session.run(training.step)
        before = session.should_stop()
    return [before, session.should_stop()]


def recover(directory: str, rank: int, at: int) -> dict[str, Any]:
    """One rank's step fails once, with its weight spoiled; the others have done the step."""
    training, hook, found = Training(), distckpt.CheckpointSaverHook(directory, save_steps=2), []
    spoil = [OSError("lost")]

    def step() -> int:
        if training.step() == at and dist.get_rank() == rank and spoil:
            training.weight.fill_(-1)
            raise spoil.pop()
        return training.at

    with distckpt.TrainingSession(
        [hook], lambda: training.at, checkpoint=training.checkpoint, recoverable=[OSError]
    ) as session:
        found = [session.run(step) for _ in range(5)]
    return {"at": found, "weight": training.weight[:2].tolist()}


class Saved(distckpt.CheckpointSaverListener):
    """Which steps were saved; one rank's asks to stop at one of them."""

    def __init__(self, rank: int = -1, at: int = -1) -> None:
        self.rank, self.at, self.steps = rank, at, list[int]()

    def before_save(self, session: hooks.Session, global_step_value: int) -> None:
        self.steps.append(global_step_value)


class Stops(Saved):
    """As Saved, and one rank's asks to stop at one of them."""

    def after_save(self, session: hooks.Session, global_step_value: int) -> bool:
        return session.rank == self.rank and global_step_value == self.at


def clocks(directory: str, save_secs: float, steps: int) -> list[int]:
    """Each rank's clock goes as it likes; which steps were saved."""
    training, saved, real = Training(), Saved(), time.time
    base = real() + 1e6 * dist.get_rank()
    time.time = lambda: base + training.at * (100.0 if dist.get_rank() else 1.0)
    try:
        hook = distckpt.CheckpointSaverHook(directory, save_secs=save_secs, listeners=[saved])
        with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
            for _ in range(steps):
                session.run(training.step)
    finally:
        time.time = real
    return saved.steps


def listener_stops(directory: str, rank: int, at: int) -> dict[str, Any]:
    """One rank's listener asks to stop. ``late`` counts steps with a second agreement."""
    training, stops = Training(), Stops(rank, at)
    hook = distckpt.CheckpointSaverHook(directory, save_steps=2, listeners=[stops])
    asked, late = Agreement.any, []

    def counted(self: Agreement, *wishes: bool, place: int = 0) -> tuple[bool, ...]:
        late.append(place)
        return asked(self, *wishes, place=place)

    Agreement.any = counted  # type: ignore[method-assign]
    try:
        with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
            while not session.should_stop():
                session.run(training.step)
            in_steps = len(late)
    finally:
        Agreement.any = asked  # type: ignore[method-assign]
    return {"steps": training.steps, "saved": stops.steps, "late": in_steps - training.steps}


def save_fails(directory: str, rank: int) -> dict[str, Any]:
    """One rank cannot write at the second save; the step in which that is raised."""
    training, hook = Training(), distckpt.CheckpointSaverHook(directory, save_steps=5)
    loop = distckpt.HookedLoop([hook], lambda: training.at, checkpoint=training.checkpoint)
    loop.begin()
    if dist.get_rank() == rank:
        fault = FaultOn("put_unique", Fault.BEFORE, "model.ckpt-5/")
        write_to(hook.get_saver(loop), FaultyStore(LocalStore(directory), fault))

    def run() -> None:
        while True:
            _step(loop, training.step if training.at < 6 else lambda: time.sleep(0.001))

    error, at = _error(run), training.at
    _step(loop, training.step)
    loop.end()
    loop.close()
    return {"error": error, "at": at}


def one_is_told(rank: int) -> str:
    """One rank hears that a save has failed which another takes for committed."""
    training = Training()
    pending = PendingSave("ckpt-7", 7)
    if dist.get_rank() == rank:
        progress_of(pending).ended.set_exception(SaveError(7, "lost sight of the coordinator"))
    else:
        progress_of(pending).ended.set_result(None)  # type: ignore[arg-type]
    hook = NothingFirst("nowhere", save_steps=100)
    loop = distckpt.HookedLoop([hook], lambda: training.at)
    loop.begin()
    hook._last, hook._pending = pending, [pending]
    error = _error(lambda: _step(loop, training.step))
    _step(loop, training.step)
    loop.close()
    return error


def saver_of_one(directory: str) -> str:
    """Every rank has a manager that saves by itself."""
    own = f"{directory}/{dist.get_rank()}"
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), own, rank=0, world_size=1) as manager:
        loop = distckpt.HookedLoop([distckpt.CheckpointSaverHook(own, save_steps=1, saver=manager)], lambda: 0)
        try:
            loop.begin()
        except ValueError as error:
            return str(error)
        finally:
            loop.close()
    return ""


def preempted(directory: str) -> dict[str, Any]:
    """Train until a signal comes."""
    training, hook = Training(), distckpt.CheckpointSaverHook(directory, save_steps=10**9)

    def step() -> None:
        time.sleep(0.002)
        training.step()

    with distckpt.TrainingSession([hook], lambda: training.at, checkpoint=training.checkpoint) as session:
        while not session.should_stop():
            session.run(step)
    return {"steps": training.steps}


def example(directory: str, steps: int, save_steps: int, loss: float) -> None:
    """What the example does."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        importlib.import_module("hook").train(directory, steps, save_steps, loss)
    finally:
        sys.path.pop(0)


def _step(loop: distckpt.HookedLoop, step: Callable[[], object]) -> None:
    loop.before_step()
    step()
    loop.after_step()


def _error(function: Callable[[], object]) -> str:
    try:
        function()
    except (DistckptError, ValueError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else type(error).__name__
    return ""
