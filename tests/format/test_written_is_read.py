"""What can be written can be read: no value is stored that makes a restore find damage where there is none."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distckpt.errors import EncodeError
from distckpt.format.tree.values import decode_value, encode_value

MANY_DIMENSIONS = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
"""Whether NumPy makes arrays of more than 32 dimensions itself."""

Point = namedtuple("Point", "x y")  # noqa: PYI024


@dataclass
class Settings:
    lr: Any
    name: Any


class Row(list[Any]):
    pass


def nested(dtype: np.dtype[Any], levels: int) -> np.dtype[Any]:
    for _ in range(levels):
        dtype = np.dtype([("inner", dtype)])
    return dtype


@pytest.mark.parametrize(
    "dtype",
    [
        nested(np.dtype(">i4"), 17),
        *([np.dtype([("a", ">i4", (1,) * 40)])] if MANY_DIMENSIONS else []),
        np.dtype([("a", ">i4", (0,))]),
        np.dtype([]),
    ],
)
def test_arrays_that_no_reader_would_take_are_refused(dtype: np.dtype[Any]) -> None:
    with pytest.raises(EncodeError, match=r"a dtype that cannot be stored: .* Store its fields one by one"):
        encode_value(np.zeros(2, dtype), "k")


@pytest.mark.parametrize(
    "dtype",
    [
        nested(np.dtype(">i4"), 16),
        np.dtype([("a", ">i4", (1,) * (32 if MANY_DIMENSIONS else 31))]),
        np.dtype([("a", ">i4", (0,)), ("b", "?")]),
    ],
)
def test_arrays_just_within_what_readers_take_come_back(dtype: np.dtype[Any]) -> None:
    assert decode_value(encode_value(np.zeros(2, dtype), "k"), "file", "k").dtype == dtype


WRAPS: list[Callable[[Any], Any]] = [
    lambda value: [value],
    lambda value: (value,),
    lambda value: {"name": value},
    lambda value: {1: value},
    lambda value: OrderedDict(name=value),
    lambda value: OrderedDict({2: value}),
    lambda value: defaultdict(list, name=value),
    lambda value: deque([value]),
    lambda value: Settings(value, 1),
    lambda value: Point(1, value),
    lambda value: Row([value]),
    lambda value: slice(value),
    lambda value: [[value], [1]],
]
CORES = [1, 2.5, "text", float("inf"), 1 << 70, np.datetime64(3, "s"), np.random.default_rng(1)]


def test_nesting_ends_for_writers_where_it_ends_for_readers(seed: int) -> None:
    dice = random.Random(seed)
    refused = 0
    for _ in range(600):
        value, wraps = dice.choice(CORES), dice.sample(WRAPS, dice.randint(1, 4))
        for _ in range(dice.randint(45, 104)):
            value = dice.choice(wraps)(value)
        try:
            data = encode_value(value, "k")
        except EncodeError:
            refused += 1
        else:
            decode_value(data, "file", "k")
    assert 0 < refused < 600
