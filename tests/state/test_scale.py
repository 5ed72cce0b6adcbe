"""What a restore costs grows as what it looks at does: every key is looked at once, not once for each other key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import distckpt
from distckpt.directory.locate import locate, read_index
from distckpt.state.collector import Collector
from distckpt.state.filler import Filler
from distckpt.state.selection import EVERYTHING, Selection
from distckpt.state.stored import Committed
from tests.support import opcodes
from tests.support.checkpoints import PerRankValues, write_checkpoint
from tests.support.pressure import PACKAGE

FEW, MANY = 50, 200


class Work:
    """How many instructions of the package's code are executed inside."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Work:
        opcodes.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return self._pass

    def _pass(self, frame: FrameType, event: str, arg: object) -> Any:
        self.count += event == "opcode"
        return self._pass


def many(name: str, count: int) -> dict[str, Any]:
    """So many places with a tensor in each."""
    return {f"{name}{at}": {"w": torch.zeros(1)} for at in range(count)}


def same(count: int) -> tuple[distckpt.Checkpoint, Selection]:
    return distckpt.Checkpoint(tree=many("k", count)), EVERYTHING


def other_names(count: int) -> tuple[distckpt.Checkpoint, Selection]:
    return distckpt.Checkpoint(tree=many("other", count)), EVERYTHING


def many_objects(count: int) -> tuple[distckpt.Checkpoint, Selection]:
    return distckpt.Checkpoint(**many("k", count)), EVERYTHING


def renamed(count: int) -> tuple[distckpt.Checkpoint, Selection]:
    names = {f"tree.k{at}": f"tree.other{at}" for at in range(count)}
    return distckpt.Checkpoint(tree=many("other", count)), Selection.of(None, names)


def selected(count: int) -> tuple[distckpt.Checkpoint, Selection]:
    return distckpt.Checkpoint(tree=many("k", count)), Selection.of([f"tree.k{at}" for at in range(count)], None)


@pytest.mark.parametrize("objects", [same, other_names, many_objects, renamed, selected])
def test_four_times_as_many_keys_cost_about_four_times_as_much(
    tmp_path: Path, objects: Callable[[int], tuple[distckpt.Checkpoint, Selection]]
) -> None:
    work = {}
    for count in (FEW, MANY):
        where = locate(write_checkpoint(tmp_path / str(count), 1, {"tree": many("k", count)}))
        index = read_index(where)
        checkpoint, selection = objects(count)
        with Work() as inside:
            filler = Filler(checkpoint, Committed(where, index), 0, 1, True, selection)
            filler.read()
            filler.finish()
        work[count] = inside.count
    assert work[MANY] < 6 * work[FEW]


@pytest.mark.parametrize("on_resize", ["same", "drop", lambda values, rank, world: values[rank]])
def test_state_of_four_times_as_many_ranks_costs_about_four_times_as_much(tmp_path: Path, on_resize: Any) -> None:
    work = {}
    for ranks in (8, 32):
        saved = PerRankValues([{"at": rank, "seen": torch.zeros(2)} for rank in range(ranks)])
        where = locate(write_checkpoint(tmp_path / str(ranks), 1, {"loader": saved}, ranks))
        index = read_index(where)
        how = "error" if on_resize == "same" else on_resize
        checkpoint = distckpt.Checkpoint(loader=distckpt.PerRank({"at": 0, "seen": torch.zeros(2)}, how))
        with Work() as inside:
            filler = Filler(checkpoint, Committed(where, index), 3, ranks if on_resize == "same" else ranks - 1, True)
            filler.read()
            filler.finish()
        work[ranks] = inside.count
    assert work[32] < 6 * work[8]


def an_optimizer_each(count: int) -> distckpt.Checkpoint:
    """A layer, and for each of its parameters an optimizer that has taken a step."""
    model = torch.nn.ParameterList(torch.zeros(1) for _ in range(count))
    optimizers = {f"of_{at}": torch.optim.SGD([parameter], momentum=0.9) for at, parameter in enumerate(model)}
    for parameter in model:
        parameter.grad = torch.ones(1)
    for optimizer in optimizers.values():
        optimizer.step()
    return distckpt.Checkpoint(model=model, **optimizers)


def test_four_times_as_many_optimizers_of_a_parameter_each_cost_about_four_times_as_much(tmp_path: Path) -> None:
    to_save, to_restore = {}, {}
    for count in (20, 80):
        checkpoint = an_optimizer_each(count)
        collector = Collector(checkpoint, 0, 1)
        with Work() as inside:
            collector.collect()
        to_save[count] = inside.count
        where = locate(checkpoint.write(tmp_path / str(count)))
        with Work() as inside:
            filler = Filler(an_optimizer_each(count), Committed(where, read_index(where)), 0, 1)
            filler.read()
            filler.finish()
        to_restore[count] = inside.count
    assert to_save[80] < 6 * to_save[20]
    assert to_restore[80] < 6 * to_restore[20]
