"""CheckpointManager in one process, without Ray: what is saved comes back, what cannot be saved is refused."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distckpt
from distckpt.errors import (
    CheckpointNotFoundError,
    CoordinatorError,
    EncodeError,
    MismatchError,
    ResizeError,
    StorageError,
)
from distckpt.storage import LocalStore, ObjectInfo
from tests.support.gang import Gang
from tests.support.models import make_model, train
from tests.support.small_runs import numbers, until
from tests.support.swapped import write_to


class Color(enum.Enum):
    RED = "red"


def odd_state() -> dict[str, object]:
    tied = torch.arange(6.0)
    return {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "fp8": torch.randn(7, 3).to(torch.float8_e4m3fn),
        "complex": torch.randn(4, 2, dtype=torch.complex64),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "tied": {"one": tied, "other": tied},
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "array": np.arange(5, dtype=np.int16),
        "list": [torch.ones(2), 3, None, ("a", 1.5)],
        "plain": {"none": None, "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "color": Color.RED, 7: "seven"},
        "step": 12,
    }


def blank(tree: object) -> object:
    """The same structure with other contents."""
    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, np.ndarray):
        return np.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: blank(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [blank(value) for value in tree]
    return None if not isinstance(tree, tuple) else tuple(blank(value) for value in tree)


def assert_same(one: object, other: object, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        left, right = one.detach().contiguous().reshape(-1), other.detach().contiguous().reshape(-1)
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, np.asarray(other)), where
    elif isinstance(one, dict):
        assert isinstance(other, dict), where
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other), where
        assert len(one) == len(other), where
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}.{at}")
    else:
        assert one == other, where


def test_odd_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = odd_state()
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path) as manager:
        path = manager.save(3).result(30)
    assert path == f"{tmp_path}/ckpt-3"
    target = blank(state)
    assert isinstance(target, dict)
    distckpt.Checkpoint(state=target).restore(path).assert_consumed()
    assert_same(state, target)


def test_load_gives_the_saved_tree(tmp_path: Path) -> None:
    state = odd_state()
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path) as manager:
        path = manager.save().result(30)
    loaded = distckpt.load(path)
    assert loaded["save_counter"] == 1
    assert list(loaded["state"]) == list(state)
    assert_same(loaded["state"]["plain"], state["plain"])
    assert_same(loaded["state"]["bf16"], state["bf16"])


def test_training_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    def objects() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, optimizer, scheduler = objects()
    train(model, optimizer, 3)
    scheduler.step()
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, scheduler=scheduler)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(3).result(30)
    expected = train(model, optimizer, 2, seed=9)

    model, optimizer, scheduler = objects()
    train(model, optimizer, 1, seed=5)
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(model=model, optimizer=optimizer, scheduler=scheduler), tmp_path
    ) as manager:
        assert manager.restore_or_initialize() == f"{tmp_path}/ckpt-3"
    assert scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert train(model, optimizer, 2, seed=9) == expected


def test_restores_into_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model, optimizer=optimizer), tmp_path) as manager:
        path = manager.save().result(30)
    expected = train(model, optimizer, 2, seed=9)
    model = make_model(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    distckpt.Checkpoint(model=model, optimizer=optimizer).restore(path).assert_consumed()
    assert train(model, optimizer, 2, seed=9) == expected


def test_saving_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    def losses(folder: Path | None) -> list[float]:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if folder is not None:
            manager = distckpt.CheckpointManager(distckpt.Checkpoint(model=model, optimizer=optimizer), folder)
            manager.prepare()
            manager.save(0).result(30)
            manager.close()
        return [train(model, optimizer, 3), train(model, optimizer, 2)]

    plain = losses(None)
    assert losses(tmp_path) == plain
    model = make_model(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer, 2)
    distckpt.Checkpoint(model=model, optimizer=optimizer).restore(tmp_path / "ckpt-0").assert_consumed()
    assert [train(model, optimizer, 3), train(model, optimizer, 2)] == plain


def test_grad_scaler_comes_back(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    checkpoint = distckpt.Checkpoint(scaler=scaler)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        path = manager.save().result(30)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    distckpt.Checkpoint(scaler=other).restore(path).assert_consumed()
    assert other.state_dict() == scaler.state_dict()


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(rng=distckpt.PerRank(distckpt.RandomState()))
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        path = manager.save().result(30)
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())
    distckpt.Checkpoint(rng=distckpt.PerRank(distckpt.RandomState())).restore(path).assert_consumed()
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_saves_see_changed_values_and_tensors(tmp_path: Path) -> None:
    model = make_model()
    extra = {"step": 0, "history": [0]}
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(model=model, extra=extra), tmp_path, max_to_keep=None
    ) as manager:
        for step in range(1, 5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(step)
            extra["step"] = step
            extra["history"] = list(range(10**step))
            manager.save(step)
        manager.wait()
        for step, path in enumerate(manager.checkpoints, 1):
            loaded = distckpt.load(path)
            assert loaded["extra"] == {"step": step, "history": list(range(10**step))}
            assert (loaded["model"]["0.up.weight"] == step).all()


def test_structure_may_change_between_saves(tmp_path: Path) -> None:
    state: dict[str, object] = {"a": torch.ones(3)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path) as manager:
        first = manager.save(1).result(30)
        state["b"] = torch.zeros(5)
        state["a"] = torch.full((4,), 2.0)
        second = manager.save(2).result(30)
    assert list(distckpt.load(first)["state"]) == ["a"]
    loaded = distckpt.load(second)["state"]
    assert loaded["a"].tolist() == [2.0] * 4
    assert loaded["b"].tolist() == [0.0] * 5


def test_what_needs_pickle_is_refused_by_its_key(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(state={"good": torch.ones(2), "deep": {"bad": object()}})
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        with pytest.raises(EncodeError, match=r"state\.deep\.bad"):
            manager.save(1)
        del checkpoint.state["deep"]
        assert manager.save(1).result(30).endswith("ckpt-1")


def test_other_shapes_are_reported_and_change_nothing(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(s={"a": torch.ones(3), "b": torch.ones(2)}), tmp_path
    ) as manager:
        path = manager.save(1).result(30)
    target = {"a": torch.zeros(4), "b": torch.zeros(2)}
    with pytest.raises(MismatchError, match=r"s\.a .*saved \[3\], here \[4\]"):
        distckpt.Checkpoint(s=target).restore(path)
    assert target["b"].tolist() == [0, 0]


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    saved = distckpt.Checkpoint(s={"a": torch.ones(3), "b": 1}, t=torch.ones(2))
    with distckpt.CheckpointManager(saved, tmp_path) as manager:
        path = manager.save(1).result(30)
    status = distckpt.Checkpoint(s={"a": torch.zeros(3), "c": torch.zeros(1)}).restore(path)
    assert status.missing == ("s.c",)
    with pytest.raises(MismatchError, match=r"s\.c"):
        status.assert_existing_objects_matched()
    status = distckpt.Checkpoint(s={"b": 0}, other=torch.zeros(1)).restore(path, partial=True)
    assert status.unexpected == ("t",)
    with pytest.raises(MismatchError):
        status.assert_consumed()


def test_dtype_of_the_destination_is_respected(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(w=torch.arange(4.0)), tmp_path) as manager:
        path = manager.save(1).result(30)
    target = torch.zeros(4, dtype=torch.bfloat16)
    distckpt.Checkpoint(w=target).restore(path)
    assert target.tolist() == [0, 1, 2, 3]
    assert target.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_to_keep": 0},
        {"max_to_keep": -1},
        {"checkpoint_interval": 5},
        {"checkpoint_name": "a/b"},
        {"buffers": 0},
        {"on_busy": "hurry"},
        {"save_timeout": 0},
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_arguments_come_in_tensorflows_order(tmp_path: Path) -> None:
    step = torch.tensor(7)
    checkpoint = distckpt.Checkpoint(a=1)
    calls: list[int] = []
    with distckpt.CheckpointManager(
        checkpoint, tmp_path, 1, 0.5, "model", step, 10, lambda: calls.append(1), 2
    ) as manager:
        assert (manager.checkpoint, manager.directory) == (checkpoint, str(tmp_path))
        assert manager.checkpoint_interval == 10
        assert manager.restore_or_initialize() is None
        assert calls == [1]
        assert manager.save(1) is None, "the last one was at step 2"
        step.fill_(12)
        assert manager.save(1).result(30) == f"{tmp_path}/model-1"


# ---- numbers and steps ------------------------------------------------------------------------------------------------


def test_numbers_follow_the_save_counter(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(a=1)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        assert manager.save().result(30).endswith("ckpt-1")
        assert manager.save(torch.tensor(7)).result(30).endswith("ckpt-7")
        assert manager.save().result(30).endswith("ckpt-3")
        assert checkpoint.save_counter == 3
    again = distckpt.Checkpoint(a=1)
    with distckpt.CheckpointManager(again, tmp_path) as manager:
        assert manager.restore_or_initialize() == f"{tmp_path}/ckpt-3"
        assert again.save_counter == 3
        assert manager.save().result(30).endswith("ckpt-4")
        assert manager.restore(7) == f"{tmp_path}/ckpt-7"


def test_a_process_that_does_not_restore_counts_from_one_again(tmp_path: Path) -> None:
    for content in (1, 2):
        with distckpt.CheckpointManager(distckpt.Checkpoint(a=content), tmp_path) as manager:
            assert manager.save().result(30) == f"{tmp_path}/ckpt-1"
            assert manager.checkpoints == [f"{tmp_path}/ckpt-1"]
        assert distckpt.load(tmp_path / "ckpt-1")["a"] == content


@pytest.mark.parametrize(
    "number",
    [
        np.int64(5),
        np.array(5, dtype=np.uint8),
        torch.tensor(5),
        torch.tensor([5]),
        torch.tensor(5.0),
        torch.nn.Parameter(torch.tensor(5.0)),
        5.0,
    ],
    ids=repr,
)
def test_a_number_or_a_step_may_be_of_any_type_that_equals_an_int(number: object) -> None:
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(a=1), "memory://number-types", step_counter=number, checkpoint_interval=3
    ) as manager:
        assert manager.save(number).result(30) == "memory://number-types/ckpt-5"
        assert manager.save(6) is None
        assert manager.restore(number) == "memory://number-types/ckpt-5"


@pytest.mark.parametrize(
    "number", [5.5, "5", b"5", float("nan"), float("inf"), torch.tensor([5, 6]), 5j, [5]], ids=repr
)
def test_what_is_no_whole_number_is_refused(number: object) -> None:
    checkpoint = distckpt.Checkpoint(a=1)
    with distckpt.CheckpointManager(checkpoint, "memory://wrong-numbers") as manager:
        with pytest.raises(TypeError, match="checkpoint_number must be a whole number"):
            manager.save(number)
        for outside in (-1, 10**18):
            with pytest.raises(ValueError, match="from 0 to"):
                manager.save(outside)
    with (
        distckpt.CheckpointManager(
            checkpoint, "memory://wrong-numbers", step_counter=lambda: number, checkpoint_interval=1
        ) as manager,
        pytest.raises(TypeError, match="step_counter must be a whole number"),
    ):
        manager.save()
    assert checkpoint.save_counter == 0
    assert distckpt.latest_checkpoint("memory://wrong-numbers") is None


class Clicker:
    """An int-like of a user."""

    def __init__(self) -> None:
        self.clicks = 0

    def __index__(self) -> int:
        return self.clicks

    def __eq__(self, other: object) -> bool:
        return self.clicks == other

    def __hash__(self) -> int:
        return id(self)


def counters() -> dict[str, tuple[object, Callable[[int], object]]]:
    """Step counters, and how each is set."""
    cell, tensor, array, clicker = [0], torch.tensor(0), np.zeros((), np.int32), Clicker()
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)
    return {
        "callable": (lambda: cell[0], lambda step: cell.__setitem__(0, step)),
        "callable of a tensor": (lambda: tensor, tensor.fill_),
        "tensor": (tensor, tensor.fill_),
        "parameter": (parameter, parameter.data.fill_),
        "array": (array, array.fill),
        "int-like": (clicker, lambda step: setattr(clicker, "clicks", step)),
    }


@pytest.mark.parametrize("kind", counters())
def test_interval_and_step_counter(kind: str) -> None:
    counter, set_step = counters()[kind]
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(a=1), f"memory://{kind}", step_counter=counter, checkpoint_interval=5
    ) as manager:
        assert manager.save().result(30)
        assert manager.save() is None
        set_step(4)
        assert manager.save() is None
        assert manager.save(check_interval=False).result(30)
        assert manager.save(check_interval=False) is None
        set_step(8)
        assert manager.save() is None
        set_step(9)
        assert manager.save().result(30)
        set_step(3)
        assert manager.save() is None
        assert manager.save(check_interval=False).result(30), "the step went back"
        assert manager.checkpoint.save_counter == 4, "what was skipped is not counted"


def test_without_an_interval_the_step_does_not_matter(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, step_counter=lambda: 1 / 0) as manager:
        assert manager.save(check_interval=False).result(30).endswith("ckpt-1")
        assert manager.save().result(30).endswith("ckpt-2")


def test_an_interval_of_no_steps_saves_a_step_once(tmp_path: Path) -> None:
    step = torch.tensor(0)
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(a=1), tmp_path, step_counter=step, checkpoint_interval=0
    ) as manager:
        assert manager.save().result(30)
        assert manager.save() is None
        step += 1
        assert manager.save().result(30)


def test_the_step_that_was_restored_is_not_saved_again(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(step=torch.tensor(7)), tmp_path) as manager:
        manager.save()
    step = torch.tensor(0)
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(step=step), tmp_path, step_counter=step, checkpoint_interval=2
    ) as manager:
        manager.restore_or_initialize()
        assert manager.save(check_interval=False) is None
        step += 1
        assert manager.save() is None
        step += 1
        assert manager.save().result(30).endswith("ckpt-2")


def test_a_step_whose_save_failed_may_be_saved_again(tmp_path: Path) -> None:
    state: dict[str, object] = {"bad": object()}
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(s=state), tmp_path, step_counter=lambda: 3, checkpoint_interval=10
    ) as manager:
        with pytest.raises(EncodeError):
            manager.save()
        state.clear()
        write_to(manager, Unwritable(tmp_path))
        assert isinstance(manager.save().exception(30), StorageError)
        write_to(manager, None)
        assert manager.save().result(30).endswith("ckpt-3"), "failures burn their numbers"
        assert manager.save() is None


class Unwritable(LocalStore):
    """No shard can be written."""

    def put_unique(self, path: str, size: int, sections: object) -> ObjectInfo:
        raise StorageError(path, "no")


def test_ranks_stay_in_step_after_a_save_that_failed(gang2: Gang, tmp_path: Path) -> None:
    """They learn of the failure at different moments; still each checkpoint holds one and the same step of all."""
    arguments = {"directory": str(tmp_path), "fails_at": 2, "steps": 5, "interval": None, "heard": True}
    first, second = gang2.run("ranks.manager:save_on_after_a_failure", **arguments)
    assert first == ["begun", "begun", "RankFailedError", "begun", "begun"]
    assert second == ["begun", "EncodeError", "begun", "begun", "begun"]
    assert steps_of(tmp_path) == {1: [1, 1], 3: [3, 3], 4: [4, 4], 5: [5, 5]}
    arguments = {"directory": str(tmp_path), "fails_at": 3, "steps": 8, "interval": 2, "heard": False}
    gang2.run("ranks.manager:save_on_after_a_failure", **arguments)
    assert steps_of(tmp_path) == {5: [5, 5], 1: [1, 1], 3: [5, 5], 4: [7, 7]}


def test_managers_of_one_run_id_are_runs_of_their_own(gang2: Gang, tmp_path: Path) -> None:
    arguments = {"directory": str(tmp_path), "run_id": "job-1"}
    assert gang2.run("ranks.manager:two_managers", **arguments) == [[7.0] * 4] * 2
    assert numbers(tmp_path) == [1, 2]


def test_a_rank_that_cannot_restore_tells_the_others(gang2: Gang, tmp_path: Path) -> None:
    other, failed = gang2.run("ranks.manager:one_cannot_restore", directory=str(tmp_path))
    assert failed.startswith("ValueError")
    assert other.startswith("RestoreError")
    assert "rank 1 (" in other
    assert "cannot be put back" in other


class Interrupting(torch.Tensor):
    """Somebody presses Ctrl-C while it is copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in func.__name__:
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_interrupt_during_the_copy_leaves_a_manager_that_can_be_closed(tmp_path: Path) -> None:
    state = {"weight": torch.ones(4)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path) as manager:
        manager.save(1).result(30)
        state["weight"] = torch.ones(4).as_subclass(Interrupting)
        with pytest.raises(KeyboardInterrupt):
            manager.save(2)
        state["weight"] = torch.ones(4)
        manager.save(3).result(30)
    assert numbers(tmp_path) == [1, 3]


@pytest.mark.parametrize(
    ("what", "where"),
    [
        *((what, "the same thread") for what in ("prepare", "save", "restore", "wait", "close")),
        *((what, "another thread") for what in ("prepare", "save", "restore")),
    ],
)
def test_what_is_called_while_a_thread_saves_is_refused_at_once(tmp_path: Path, what: str, where: str) -> None:
    """By a signal handler, say, that comes while the state is being copied."""
    heard = []

    def call() -> CoordinatorError:
        said = f"{what} was called while save was running in {where}"
        with pytest.raises(CoordinatorError, match=said) as caught:
            getattr(manager, what)(*([9] if what == "save" else []))
        return caught.value

    class Handler(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "copy" in func.__name__ and not heard:
                with ThreadPoolExecutor(1) as other:
                    heard.append(call() if where == "the same thread" else other.submit(call).result(30))
            return super().__torch_function__(func, types, args, kwargs or {})

    state = {"weight": torch.ones(4).as_subclass(Handler)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path) as manager:
        manager.save(1).result(30)
        manager.save(2).result(30)
    assert heard
    assert numbers(tmp_path) == [1, 2]


def test_threads_that_save_one_after_the_other_may_be_several(tmp_path: Path) -> None:
    value = torch.tensor(0)
    with distckpt.CheckpointManager(distckpt.Checkpoint(v=value), tmp_path) as manager:
        for number in (1, 2, 3):
            with ThreadPoolExecutor(1) as other:
                other.submit(manager.save, number).result(30).result(30)
    assert numbers(tmp_path) == [1, 2, 3]


def steps_of(directory: Path) -> dict[int, list[int]]:
    """The step of each rank in every checkpoint, by number."""
    # From the log: the state file comes after the ranks have their answer.
    loaded = {number: distckpt.load(directory / f"ckpt-{number}") for number in numbers(directory)}
    return {number: [mine["step"] for mine in state["mine"]] for number, state in loaded.items()}


# ---- restoring --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_to_restore_may_be_named_in_many_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = torch.tensor(0)
    with distckpt.CheckpointManager(distckpt.Checkpoint(v=value), "run", checkpoint_name="old") as manager:
        for number in (1, 2):
            value.fill_(10 + number)
            old = manager.save(number)
    with distckpt.CheckpointManager(distckpt.Checkpoint(v=value), "run") as manager:
        value.fill_(21)
        saved = manager.save(1)
        saved.result(30)
        for which, expected in {
            1: 21,
            np.int64(2): 12,
            old: 12,
            saved: 21,
            "run/old-1": 11,
            f"file://{tmp_path}/run/ckpt-1": 21,
            tmp_path / "run" / "old-2": 12,
            f"{tmp_path}/run/": 21,
            None: 21,
            manager.checkpoints[0]: 11,
            manager.latest_checkpoint: 21,
        }.items():
            value.fill_(0)
            assert manager.restore(which).startswith(f"{tmp_path}/run/")
            assert int(value) == expected, which
        for missing in (7, "run/old-7", "run/neither-1"):
            with pytest.raises(CheckpointNotFoundError, match="no such checkpoint is committed"):
                manager.restore(missing)
        for elsewhere in ("elsewhere/ckpt-1", tmp_path / "ckpt-1", "run/ckpt-1/x", "run/ckpt"):
            with pytest.raises(CheckpointNotFoundError, match="not a checkpoint of"):
                manager.restore(elsewhere)


def test_a_save_in_flight_is_restored_and_not_initialized_over(tmp_path: Path) -> None:
    """TensorFlow's manager calls init_fn while its first asynchronous save is still being written."""
    weights = torch.ones(1 << 20)
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(w=weights), tmp_path, init_fn=lambda: weights.fill_(-1)
    ) as manager:
        manager.save(1)
        weights.fill_(2)
        assert manager.restore_or_initialize() == f"{tmp_path}/ckpt-1"
    assert weights.unique().tolist() == [1]


def test_the_latest_checkpoint_of_a_fresh_directory_restores_nothing(tmp_path: Path) -> None:
    """``checkpoint.restore(manager.latest_checkpoint)`` is how TensorFlow's users begin."""
    weights = torch.ones(3)
    checkpoint = distckpt.Checkpoint(w=weights, v=2)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        status = checkpoint.restore(manager.latest_checkpoint)
        assert status.expect_partial() is status
        for check in (status.assert_consumed, status.assert_existing_objects_matched, status.assert_nontrivial_match):
            with pytest.raises(MismatchError, match="no checkpoint: not in the checkpoint: w, v"):
                check()
        assert weights.tolist() == [1, 1, 1]
        manager.save().result(30)
        status = checkpoint.restore(manager.latest_checkpoint)
        assert status.assert_consumed().assert_existing_objects_matched().assert_nontrivial_match() is status
        with pytest.raises(MismatchError, match="in no object: w, v"):
            distckpt.Checkpoint(other=1).restore(manager.latest_checkpoint, partial=True)


def test_init_fn_runs_only_without_a_checkpoint(tmp_path: Path) -> None:
    calls: list[int] = []
    for expected in (1, 1):
        with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, init_fn=lambda: calls.append(1)) as manager:
            manager.restore_or_initialize()
            assert len(calls) == expected
            manager.save(5)


def test_per_rank_state_needs_a_rule_on_another_world_size(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(x=distckpt.PerRank({"n": 5})), tmp_path) as manager:
        path = manager.save(1).result(30)
    from distckpt.directory.locate import locate, read_index
    from distckpt.state.filler import restore_objects
    from distckpt.state.stored import Committed

    where = locate(path)
    with pytest.raises(ResizeError, match="x: per-rank state of 1 ranks"):
        restore_objects(distckpt.Checkpoint(x=distckpt.PerRank({"n": 0})), Committed(where, read_index(where)), 1, 2)
    kept = {"n": 0}
    restore_objects(distckpt.Checkpoint(x=distckpt.PerRank(kept, "drop")), Committed(where, read_index(where)), 1, 2)
    assert kept == {"n": 0}
    seen: list[object] = []

    def choose(values: list[object], rank: int, world_size: int) -> object:
        seen.extend([values, rank, world_size])
        return {"n": 9}

    restore_objects(distckpt.Checkpoint(x=distckpt.PerRank(kept, choose)), Committed(where, read_index(where)), 1, 2)
    assert seen == [[{"n": 5}], 1, 2]
    assert kept == {"n": 9}


def test_an_uncollected_failure_comes_out_of_the_next_call(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(3)), folder)
    manager.save(1).result(30)
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "run").write_text("in the way")
    pending = manager.save(2)
    assert pending.exception(30) is not None
    manager.save(3)
    with pytest.raises(distckpt.errors.DistckptError):
        manager.wait()
    failed = manager.save(4)
    until(failed.done)
    (tmp_path / "run").unlink()
    moved.rename(folder)
    with pytest.raises(distckpt.errors.DistckptError):
        manager.save(5)
    manager.sync()
    assert manager.latest_checkpoint == f"{folder}/ckpt-5", "it was begun all the same"
    manager.close()
    assert distckpt.latest_checkpoint(folder) == f"{folder}/ckpt-5"


def test_a_save_that_has_failed_when_it_returns_is_raised_later_too(tmp_path: Path) -> None:
    old = distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, on_busy="skip")
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=2), tmp_path) as manager:
        manager.save(1).result(30)
    assert isinstance(old.save(2).exception(30), CoordinatorError)
    assert old.save(3).done()
    with pytest.raises(CoordinatorError):
        old.wait()
    old.close()
