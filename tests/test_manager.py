"""CheckpointManager in one process, without Ray: what is saved comes back, what cannot be saved is refused."""

from __future__ import annotations

import enum
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import distckpt
from distckpt.errors import EncodeError, MismatchError, ResizeError
from tests.models import make_model, train


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
    with distckpt.CheckpointManager(distckpt.Checkpoint(s={"a": torch.ones(3), "b": 1}), tmp_path) as manager:
        path = manager.save(1).result(30)
    status = distckpt.Checkpoint(s={"a": torch.zeros(3), "c": torch.zeros(1)}).restore(path)
    assert status.missing == ("s.c",)
    with pytest.raises(MismatchError, match=r"s\.c"):
        status.assert_existing_objects_matched()
    status = distckpt.Checkpoint(other=torch.zeros(1)).restore(path, partial=True)
    assert set(status.unexpected) >= {"s.a", "s.b"}
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
    [{"max_to_keep": 0}, {"max_to_keep": -1}, {"checkpoint_interval": 5}, {"buffers": 0}, {"on_busy": "hurry"}],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, **arguments)


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


def test_interval_and_step_counter(tmp_path: Path) -> None:
    step = [0]
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(a=1), tmp_path, step_counter=lambda: step[0], checkpoint_interval=5
    ) as manager:
        assert manager.save().result(30)
        assert manager.save() is None
        step[0] = 4
        assert manager.save() is None
        assert manager.save(check_interval=False).result(30)
        assert manager.save(check_interval=False) is None
        step[0] = 9
        assert manager.save().result(30)


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
    from distckpt.restoring import restore_objects
    from distckpt.transfer.catalog import locate, read_index

    where = locate(path)
    with pytest.raises(ResizeError, match="x: per-rank state of 1 ranks"):
        restore_objects(distckpt.Checkpoint(x=distckpt.PerRank({"n": 0})), where, read_index(where), 1, 2)
    kept = {"n": 0}
    restore_objects(distckpt.Checkpoint(x=distckpt.PerRank(kept, "drop")), where, read_index(where), 1, 2)
    assert kept == {"n": 0}
    seen: list[object] = []

    def choose(values: list[object], rank: int, world_size: int) -> object:
        seen.extend([values, rank, world_size])
        return {"n": 9}

    restore_objects(distckpt.Checkpoint(x=distckpt.PerRank(kept, choose)), where, read_index(where), 1, 2)
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
    (tmp_path / "run").unlink()
    moved.rename(folder)
    manager.save(4).result(30)
    manager.close()
    assert distckpt.latest_checkpoint(folder) == f"{folder}/ckpt-4"
