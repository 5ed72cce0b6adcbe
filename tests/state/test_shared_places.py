"""Tensors of one model that share memory, wholly or in part, and were saved with different content: as torch restores them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import distckpt
from distckpt.directory.locate import locate, read_index
from distckpt.state.filler import Filler
from distckpt.state.stored import Committed

ROWS, COLUMNS = 4000, 200


class OwnParameter(nn.Parameter):
    """A class of its own, as libraries have them."""


class Two(nn.Module):
    """Two parameters, in this order."""

    def __init__(self, one: torch.Tensor, other: torch.Tensor) -> None:
        super().__init__()
        self.one, self.other = one, other


def tied() -> Two:
    parameter = OwnParameter(torch.zeros(ROWS, COLUMNS))
    return Two(parameter, parameter)


def same_memory() -> Two:
    whole = torch.zeros(ROWS, COLUMNS)
    return Two(nn.Parameter(whole), nn.Parameter(whole.view(ROWS, COLUMNS)))


def begins_there() -> Two:
    whole = torch.zeros(ROWS, COLUMNS)
    return Two(nn.Parameter(whole), nn.Parameter(whole[: ROWS // 2]))


def is_cut_out_of_it() -> Two:
    whole = torch.zeros(ROWS, COLUMNS)
    return Two(nn.Parameter(whole), nn.Parameter(whole[:, 50:150]))


def swapped(make: Callable[[], Two]) -> Callable[[], Two]:
    def other_way_round() -> Two:
        two = make()
        return Two(two.other, two.one)

    other_way_round.__name__ = f"{make.__name__}_swapped"
    return other_way_round


KINDS = [tied, same_memory, begins_there, is_cut_out_of_it, swapped(begins_there), swapped(is_cut_out_of_it)]


def apart(like: Two) -> Two:
    """With memory for each, and other content in each."""
    return Two(nn.Parameter(torch.rand(like.one.shape)), nn.Parameter(torch.rand(like.other.shape)))


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_later_one_counts_where_they_are_the_same(tmp_path: Path, make: Callable[[], Two]) -> None:
    saved = apart(make())
    path = distckpt.Checkpoint(model=saved).write(tmp_path / "saved")
    by_torch = make()
    by_torch.load_state_dict(saved.state_dict())
    for _ in range(5):  # reads go on beside each other
        model = make()
        distckpt.Checkpoint(model=model).restore(path)
        assert torch.equal(model.one, by_torch.one)
        assert torch.equal(model.other, by_torch.other)


@pytest.mark.parametrize("make", [tied, same_memory])
def test_of_the_earlier_one_nothing_is_read(tmp_path: Path, make: Callable[[], Two]) -> None:
    where = locate(distckpt.Checkpoint(model=apart(make())).write(tmp_path / "saved"))
    filler = Filler(distckpt.Checkpoint(model=make()), Committed(where, read_index(where)), 0, 1)
    filler.read()
    assert filler.bytes_read < 1.5 * ROWS * COLUMNS * 4
