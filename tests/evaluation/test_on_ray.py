"""A pool of workers on a Ray cluster shares the checkpoints of a run, whoever dies."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

import distckpt
from distckpt.directory.groups import read_groups
from distckpt.directory.picture import picture_of
from distckpt.errors import GroupMismatchError
from distckpt.evaluation.watched import WatchedCheckpoint
from distckpt.storage import open_store
from tests.support.actors import end_watcher
from tests.support.checkpoints import append_state, commit_bare
from tests.support.snippets import play

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.timeout(150)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The directory of a run that is over, with five checkpoints."""
    for number in range(1, 6):
        commit_bare(tmp_path, number)
    append_state(open_store(tmp_path), lambda state: msgspec.structs.replace(state, ended=True), kind="end")
    yield tmp_path
    end_watcher(str(tmp_path))


def evaluate(fn: Callable[[WatchedCheckpoint], Any] | type, directory: Path, **options: Any) -> Any:
    from distckpt.ray import evaluate

    return evaluate(fn, directory, group="eval", mode="all", num_workers=2, ray_remote_args={"num_cpus": 0}, **options)


def number_of(checkpoint: WatchedCheckpoint) -> int:
    return checkpoint.number


def test_each_checkpoint_is_evaluated_by_one_worker_until_the_run_is_over(run: Path) -> None:
    found = evaluate(number_of, run)
    assert sorted(each.result for each in found.acknowledged) == [1, 2, 3, 4, 5]
    assert {each.path for each in found.acknowledged} == {f"{run}/ckpt-{number}" for number in range(1, 6)}
    assert {each.delivery for each in found.acknowledged} == {1}
    assert found.set_aside == ()
    assert evaluate(number_of, run).acknowledged == ()


def test_a_pool_evaluates_as_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), tmp_path / "run-7") as manager:
        manager.save(1).result()
    append_state(open_store(tmp_path / "run-7"), lambda state: msgspec.structs.replace(state, ended=True), kind="end")
    names = {"model": torch.nn.Linear(2, 2), "held_out_loss": lambda model: model.weight.sum().item()}
    play(
        "docs/integrations.md", 0, names, tmp_path, {"num_workers=4": "num_workers=1", '"num_gpus": 1': '"num_cpus": 0'}
    )
    assert "run-7/ckpt-1" in capsys.readouterr().out
    weight = model.weight.sum().item()
    assert picture_of(open_store(tmp_path / "run-7")).metrics == {"loss": [(1, pytest.approx(weight))]}
    end_watcher(str(tmp_path / "run-7"))


def refuse_three(checkpoint: WatchedCheckpoint) -> int:
    if checkpoint.number == 3:
        raise ValueError("three is bad")
    return checkpoint.number


def test_what_the_function_refuses_is_told_and_the_worker_goes_on(run: Path) -> None:
    found = evaluate(refuse_three, run, max_attempts=2, backoff=0.1)
    assert sorted(each.number for each in found.acknowledged) == [1, 2, 4, 5]
    [aside] = found.set_aside
    assert (aside.number, aside.error) == (3, "ValueError: three is bad")


def die_once(checkpoint: WatchedCheckpoint) -> tuple[int, int]:
    """The worker that gets the second checkpoint first is killed."""
    if checkpoint.number == 2 and checkpoint.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return checkpoint.number, checkpoint.delivery


def test_a_worker_that_dies_is_replaced_and_what_it_had_goes_to_another(run: Path) -> None:
    found = evaluate(die_once, run, lease_seconds=1.0)
    assert sorted(each.result for each in found.acknowledged) == [(1, 1), (2, 2), (3, 1), (4, 1), (5, 1)]


class Counting:
    """Made once by each worker."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, checkpoint: WatchedCheckpoint) -> int:
        self.count += 1
        return self.count


class Hopeless:
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no model here")

    def __call__(self, checkpoint: WatchedCheckpoint) -> None:
        """Never comes to it."""


def test_a_class_is_made_once_by_each_worker(run: Path) -> None:
    results = [each.result for each in evaluate(Counting, run).acknowledged]
    assert 3 <= max(results) <= 5
    assert results.count(1) <= 2


def test_a_class_that_cannot_be_made_is_an_error_at_once(run: Path) -> None:
    import ray

    with pytest.raises(ray.exceptions.RayActorError, match="no model here"):
        evaluate(Hopeless, run)


class Silent:
    """Its instances cannot be called."""


@pytest.mark.parametrize("fn", [5, None, Silent, Silent()])
def test_what_cannot_be_called_is_refused_and_no_checkpoint_is_blamed(fn: Any, run: Path) -> None:
    with pytest.raises(TypeError, match="fn must be a function, or a class whose instances can be called, not"):
        evaluate(fn, run)
    assert read_groups(open_store(run)) == {}


@pytest.mark.parametrize("num_workers", [0, -1])
def test_without_workers_nothing_could_be_evaluated(num_workers: int, run: Path) -> None:
    with pytest.raises(ValueError, match=f"num_workers is at least 1, not {num_workers}"):
        distckpt.ray.evaluate(number_of, run, group="eval", num_workers=num_workers)


def test_what_watch_raises_comes_at_once_and_as_itself(run: Path) -> None:
    distckpt.watch(run, group="eval", mode="latest").close()
    with pytest.raises(GroupMismatchError, match="mode is 'latest' and not 'all'"):
        evaluate(number_of, run)
    for group, options in (("other", {"mode": "banana"}), ("a/b", {}), ("other", {"max_in_flight": 0})):
        with pytest.raises(ValueError, match=r"banana|a/b|max_in_flight"):
            distckpt.ray.evaluate(number_of, run, group=group, **cast("dict[str, Any]", options))


def lock_of_three(checkpoint: WatchedCheckpoint) -> Any:
    """What nobody can send."""
    return threading.Lock() if checkpoint.number == 3 else torch.ones(2)


def test_a_result_that_cannot_be_sent_is_refused_and_the_others_come(run: Path) -> None:
    found = evaluate(lock_of_three, run, max_attempts=1)
    assert sorted(each.number for each in found.acknowledged) == [1, 2, 4, 5]
    assert torch.equal(found.acknowledged[0].result, torch.ones(2))
    [aside] = found.set_aside
    assert aside.number == 3
    assert aside.error.startswith("TypeError: fn returned a lock, which cannot be sent to the caller: ")


def test_ray_stays_ray() -> None:
    """Whoever imports distckpt.ray, or all of distckpt's names."""
    import ray

    assert distckpt.ray is importlib.import_module("distckpt.ray")
    assert importlib.import_module("ray") is ray
    assert distckpt.ray is not ray
    assert distckpt.ray.evaluate.__module__.startswith("distckpt")
    assert "ray" not in distckpt.__all__
