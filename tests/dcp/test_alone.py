"""torch.distributed.checkpoint with our Writer and Reader, in one process."""

from __future__ import annotations

import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import distckpt
from distckpt.dcp.session import MOST_SESSIONS, Flight
from distckpt.directory.garbage import attempt_folders
from distckpt.directory.log import read_tail
from distckpt.errors import (
    CheckpointNotFoundError,
    DamagedError,
    EncodeError,
    FencedError,
    MismatchError,
    RestoreError,
    SaveError,
    StaleRunError,
)
from distckpt.storage import open_store
from tests.support.comparing import same
from tests.support.damage import flip, payload_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def nested(number: int = 1) -> dict[str, Any]:
    """All that DCP flattens, and all that it does not."""
    tensor = torch.arange(12.0).reshape(3, 4) * number
    return {
        "model": {"a.weight": tensor, "b": torch.tensor(number, dtype=torch.bfloat16), "none": torch.empty(0, 3)},
        "optimizer": {
            "state": {"a.weight": {"step": torch.tensor(float(number)), "exp_avg": tensor.T}},
            "param_groups": [{"lr": 0.1 * number, "betas": (0.9, 0.99), "params": ["a.weight", "b"]}],
        },
        "pair": (torch.full((2,), number), number),
        "array": np.arange(number, number + 3),
        "tensors": [torch.tensor([number]), [number, "x"]],
        "plain": [number, None, "text", b"bytes"],
        "step": number,
    }


def saved(directory: Path, state: dict[str, Any], number: int | None = None, **options: Any) -> str:
    """The path at which DCP has saved it."""
    writer = distckpt.dcp.Writer(directory, number)
    dcp.save(state, storage_writer=writer, **options)
    assert writer.path is not None
    return writer.path


def loaded(path: str | Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What DCP makes of ``state`` from it."""
    dcp.load(state, storage_reader=distckpt.dcp.Reader(path), **options)
    return state


def failure(call: Callable[[], object]) -> BaseException:
    """What rank 0 has raised."""
    with pytest.raises(CheckpointException) as raised:
        call()
    return raised.value.failures[0][0]


def committed(directory: Path) -> list[int]:
    """The numbers of what the log lists."""
    return [record.number for record in read_tail(open_store(directory)).state.active]


def test_what_dcp_saves_is_a_checkpoint_of_ours_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = saved(tmp_path, nested(3), 42)
    assert path == str(tmp_path / "ckpt-42") == distckpt.latest_checkpoint(tmp_path)
    assert same(distckpt.load(path), nested(3))
    with distckpt.open(path) as reader:
        assert reader.verify().good
        assert reader.info("optimizer.state.a.weight.exp_avg").shape == (4, 3)
        assert list(reader.load("optimizer")["param_groups"][0]) == ["lr", "betas", "params"]
    assert (tmp_path / "checkpoint").read_text().startswith('model_checkpoint_path: "ckpt-42"')
    assert same(loaded(tmp_path, nested(1)), nested(3))
    made = dcp.state_dict_loader._load_state_dict_from_keys("optimizer", storage_reader=distckpt.dcp.Reader(path))
    assert same(made, {"optimizer": nested(3)["optimizer"]})


def test_one_writer_saves_again_and_numbers_come_from_where_dcp_names_checkpoints(tmp_path: Path) -> None:
    writer = distckpt.dcp.Writer(tmp_path, max_to_keep=3)
    names = [None, "7", tmp_path / "ckpt-5"]
    for at, name in enumerate(names):
        dcp.save({"at": at}, storage_writer=writer, checkpoint_id=name)
    dcp.async_save({"at": 3}, storage_writer=distckpt.dcp.Writer(tmp_path, max_to_keep=3)).result()
    assert committed(tmp_path) == [7, 5, 6], "1 made room"
    assert distckpt.load(tmp_path) == {"at": 3}
    assert [entry.kind for entry in entries(tmp_path)] == ["claim", "run", *["commit"] * 3, "commit"]
    for elsewhere in ("other-5", tmp_path / "step-5", tmp_path.parent / "ckpt-5"):
        with pytest.raises(ValueError, match="give it the number"):
            dcp.save({"at": 4}, storage_writer=writer, checkpoint_id=elsewhere)


def entries(directory: Path) -> list[Any]:
    """What the log has had written, but for what retention does afterwards."""
    from distckpt.directory.log import read_entry, sequence_numbers

    store = open_store(directory)
    found = [read_entry(store, seq) for seq in sequence_numbers(store)]
    return [entry for entry in found if entry.kind != "forget"]


def test_a_process_saves_to_as_many_directories_as_it_likes(tmp_path: Path) -> None:
    """It leaves the run of one that it has used least lately, and begins another when it comes back."""
    for number in (1, 2):
        for folder in "abcdef":
            saved(tmp_path / folder, {"at": number})
    assert [committed(tmp_path / folder) for folder in "abcdef"] == [[1, 2]] * 6
    assert sum(thread.name == "distckpt-timer" for thread in threading.enumerate()) <= MOST_SESSIONS


def test_the_end_of_a_program_waits_for_saves_of_other_threads_alone() -> None:
    """A save that has failed in the main thread never ends, and one of ``dcp.async_save`` is to be committed."""
    Flight(600).wait()
    begun, goes_on, ended = threading.Event(), threading.Event(), []

    def save() -> None:
        flight = Flight(600)
        flights.append(flight)
        begun.set()
        goes_on.wait()
        ended.append(1)
        flight.end()

    flights: list[Flight] = []
    thread = threading.Thread(target=save)
    thread.start()
    begun.wait()
    waiting = threading.Thread(target=lambda: (flights[0].wait(), ended.append(2)))
    waiting.start()
    goes_on.set()
    waiting.join()
    assert ended == [1, 2]


class Opaque:
    """Nothing that can be stored without pickle."""


class Half(DefaultSavePlanner):
    """Saves tensors as float16, as the documents of DCP show it."""

    def resolve_data(self, write_item: Any) -> Any:
        found = super().resolve_data(write_item)
        return found.half() if isinstance(found, torch.Tensor) else found


class OwnBytes(DefaultSavePlanner):
    """Has a way of its own to make bytes."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return io.BytesIO(b"secret") if write_item.tensor_data is None else object


def test_nothing_is_pickled_and_what_would_have_to_be_is_refused_by_its_key(tmp_path: Path) -> None:
    writer = distckpt.dcp.Writer(tmp_path)
    state = {"model": {"w": torch.ones(2)}, "extra": {"it": Opaque()}}
    error = failure(lambda: dcp.save(state, storage_writer=writer))
    assert isinstance(error, EncodeError)
    assert error.key == "extra.it"
    error = failure(lambda: dcp.save({"a": 1}, storage_writer=writer, planner=OwnBytes()))
    assert isinstance(error, EncodeError)
    assert "OwnBytes" in str(error)
    error = failure(
        lambda: dcp.save(nested(), storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    )
    assert "flatten_state_dict=True" in str(error)
    assert committed(tmp_path) == []

    dcp.save({"w": torch.ones(2), "n": 3}, storage_writer=writer, planner=Half())
    assert same(distckpt.load(tmp_path), {"w": torch.ones(2, dtype=torch.float16), "n": 3})
    flat = {"a.b": torch.ones(2), "n": 3}
    dcp.save(flat, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    assert same(loaded(tmp_path, {"a.b": torch.zeros(2), "n": 0}, planner=planner), flat)
    assert b"PROTO" not in (content := b"".join(file.read_bytes() for file in tmp_path.rglob("*.arrow")))
    assert b"torch._utils" not in content


class OwnLoading(DefaultLoadPlanner):
    """Takes bytes in a way of its own, as torch's documents advise: nothing but plain values."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def test_planners_that_load_bytes_by_themselves_get_plain_values_and_no_others(tmp_path: Path) -> None:
    """Whatever type a file names, none of its code is run."""
    path = saved(tmp_path, {"plain": [1, ("x", 2.5)], "typed": timedelta(seconds=3)})
    assert loaded(path, {"plain": None}, planner=OwnLoading()) == {"plain": [1, ("x", 2.5)]}
    error = failure(lambda: loaded(path, {"typed": None}, planner=OwnLoading()))
    assert isinstance(error, RestoreError)
    assert str(error).startswith("typed: a timedelta")
    assert loaded(path, {"typed": None}) == {"typed": timedelta(seconds=3)}


@pytest.mark.skipif(
    "enable_plan_caching" not in signature(DefaultSavePlanner).parameters, reason="torch has no such plans"
)
def test_a_planner_that_gives_the_plan_of_an_earlier_save_is_refused(tmp_path: Path) -> None:
    """It would name the attempt of that save, of which no object may be written twice."""
    writer = distckpt.dcp.Writer(tmp_path)
    planner = DefaultSavePlanner(enable_plan_caching=True)
    dcp.save({"a": 1}, storage_writer=writer, planner=planner)
    error = failure(lambda: dcp.save({"a": 2}, storage_writer=writer, planner=planner))
    assert isinstance(error, SaveError)
    assert "enable_plan_caching" in str(error)
    assert distckpt.load(tmp_path) == {"a": 1}


def test_keys_that_are_missing_sizes_that_differ_and_damage_are_told_by_key(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(3, 300), "b": torch.ones(300)}})
    assert "model.gone" in str(failure(lambda: loaded(path, {"model": {"gone": torch.ones(3)}})))
    assert "model.w" in str(failure(lambda: loaded(path, {"model": {"w": torch.ones(4, 300)}})))
    planner = DefaultLoadPlanner(allow_partial_load=True)
    found = loaded(path, {"model": {"b": torch.zeros(300), "gone": torch.zeros(2)}}, planner=planner)
    assert same(found, {"model": {"b": torch.ones(300), "gone": torch.zeros(2)}})

    file, end = payload_of(Path(path), "model.w")
    flip(file, end - 1)
    error = failure(lambda: loaded(path, {"model": {"w": torch.zeros(3, 300)}}))
    assert isinstance(error, DamagedError)
    assert error.key == "model.w"
    assert same(loaded(path, {"model": {"b": torch.zeros(300)}}), {"model": {"b": torch.ones(300)}})
    assert isinstance(failure(lambda: loaded(tmp_path / "ckpt-9", {"a": 1})), CheckpointNotFoundError)


class Trained:
    """A model and its optimizer after a step, as DCP's users have them."""

    def __init__(self, seed: int, steps: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        groups = [{"params": part.parameters(), "lr": 0.1 * at} for at, part in enumerate(self.model, 1)]
        self.optimizer = optim.AdamW(groups)
        for _ in range(steps):
            self.model(torch.rand(5, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def take(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def checkpoint(self) -> distckpt.Checkpoint:
        return distckpt.Checkpoint(model=self.model, optimizer=self.optimizer)


def test_a_checkpoint_of_a_manager_restores_what_dcp_has_saved_and_the_other_way_round(tmp_path: Path) -> None:
    there, here, back = Trained(1, 3), Trained(2, 1), Trained(3, 1)
    saved(tmp_path, there.state(), 5)
    with distckpt.CheckpointManager(here.checkpoint(), tmp_path) as manager:
        assert manager.restore_or_initialize() == str(tmp_path / "ckpt-5")
        status = manager.restore_status
        assert status is not None
        assert (status.missing, status.unexpected) == ((), ())
        assert same(here.state(), there.state())
        here.model[0].weight.data += 1
        pending = manager.save(6)
        assert pending is not None
        pending.result()
    assert committed(tmp_path) == [5, 6]
    back.take(loaded(tmp_path, back.state()))
    assert same(back.state(), here.state())


class Pair(NamedTuple):
    """A container that DCP takes as one value."""

    left: torch.Tensor
    right: int


def test_all_kinds_of_containers_are_seen_as_dcp_would_flatten_them(tmp_path: Path) -> None:
    one, two = torch.arange(3.0), torch.ones(2, 2)
    held = {
        7: one,
        "ordered": OrderedDict(a=two),
        "pair": Pair(one, 2),
        "nested": ([one], {"x": two}),
        "array": np.arange(3),
    }
    own = distckpt.PerRank({"cursor": 5, "cache": two})
    distckpt.Checkpoint(state=held, own=own, lists=[[one, {"k": 1}], [2, 3]]).write(tmp_path)
    wanted = {
        "state": {7: one * 0, "ordered": {"a": two * 0}, "pair": None, "nested": None, "array": None},
        "own": [{"cursor": 0, "cache": two * 0}],
        "lists": [[one * 0, {"k": 0}], None],
    }
    found = loaded(tmp_path, wanted)
    assert same(found["state"], {**held, "ordered": {"a": two}})
    assert same(found["own"], [{"cursor": 5, "cache": two}])
    assert same(found["lists"], [[one, {"k": 1}], [2, 3]])


def test_what_goes_by_a_number_in_the_state_dict_comes_back_under_that(tmp_path: Path) -> None:
    """As in an optimizer's own state dict. DCP itself would put what is no tensor beside it, under a text."""

    def state(number: int) -> dict[str, Any]:
        tensor = torch.full((2,), float(number))
        own = {0: {"al": [None, number, tensor], "n": number}, 1: [{2: number}, tensor], 3: number, "3x": number}
        return {"s": own, "text": {"0": {"n": number}}}

    assert same(loaded(saved(tmp_path / "minimal", state(5)), state(0)), state(5))
    both = {"s": {1: {"a": [torch.ones(1)]}, "1": {"b": 5}, 2.5: {"c": 6}}}
    assert same(
        loaded(saved(tmp_path / "both", both), {"s": {1: {"a": [torch.zeros(1)]}, "1": {"b": 0}, 2.5: {"c": 0}}}), both
    )

    def trained(steps: int) -> optim.Optimizer:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = optim.LBFGS([parameter], max_iter=3)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = (parameter**2).sum() + parameter[0] ** 4
            found.backward()
            return found

        for _ in range(steps):
            optimizer.step(loss)  # type: ignore[arg-type]  # torch annotates a closure that gives a number
        return optimizer

    wanted, there = trained(2).state_dict(), trained(2).state_dict()
    there["state"][0] |= {"n_iter": 0, "func_evals": 0}
    assert same(loaded(saved(tmp_path / "lbfgs", {"o": wanted}), {"o": there}), {"o": wanted})


def test_whoever_claims_the_directory_later_turns_the_other_away_by_name(tmp_path: Path) -> None:
    saved(tmp_path, {"state": {"a": 1}}, 1)
    with distckpt.CheckpointManager(distckpt.Checkpoint(state={"a": 0}), tmp_path) as manager:
        manager.restore()
        error = failure(lambda: saved(tmp_path, {"state": {"a": 2}}, 2))
        assert isinstance(error, FencedError | StaleRunError)
        assert isinstance(failure(lambda: saved(tmp_path, {"state": {"a": 2}}, 2)), FencedError | StaleRunError)
        pending = manager.save(3)
        assert pending is not None
        pending.result()
    assert committed(tmp_path) == [1, 3]


class Fails(distckpt.dcp.Writer):
    """Fails at one step of DCP's, once."""

    step: str | None = None

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "step"):
            self.step = None
            raise OSError(name)
        return super().__getattribute__(name)


STEPS = ["set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"]


@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_fails_at_any_step_commits_nothing_and_the_next_one_succeeds(
    tmp_path: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Fails(tmp_path)
    dcp.save({"a": torch.ones(3)}, storage_writer=writer, checkpoint_id=1)
    writer.step = step
    assert isinstance(failure(lambda: dcp.save({"a": torch.zeros(3)}, storage_writer=writer, checkpoint_id=2)), OSError)
    assert committed(tmp_path) == [1]
    assert same(loaded(tmp_path, {"a": torch.zeros(3)}), {"a": torch.ones(3)})
    dcp.save({"a": torch.ones(3) * 2}, storage_writer=writer, checkpoint_id=2)
    assert committed(tmp_path) == [1, 2]
    left = set(attempt_folders(open_store(tmp_path))) - {
        f"ckpt-{record.number}/{record.attempt}" for record in read_tail(open_store(tmp_path)).state.active
    }
    assert len(left) == (step == "finish"), "what was written is garbage that knows its attempt"
    ours = [record for record in caplog.records if record.name.startswith("distckpt")]
    assert [record for record in ours if record.levelno >= logging.ERROR] == []


def test_two_places_that_dcp_cannot_tell_apart_are_refused_by_name(tmp_path: Path) -> None:
    distckpt.Checkpoint(state={"x": [{"y": 1}], "x.0.y": 2, 3: torch.ones(1)}).write(tmp_path)
    error = failure(lambda: loaded(tmp_path, {"state": {3: torch.zeros(1)}}))
    assert isinstance(error, MismatchError)
    assert "state.x.0.y" in str(error)
