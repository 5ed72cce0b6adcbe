"""Rectangles of tensors, cut and chosen by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.stored import Chunk

ITEM = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "complex64"}
Box = tuple[tuple[int, ...], tuple[int, ...]]


def split(box: Box, rng: random.Random, times: int) -> list[Box]:
    """Cut a box in two along any dimension, and its parts again."""
    offset, length = box
    long = [dimension for dimension, size in enumerate(length) if size > 1]
    if not times or not long:
        return [box]
    dimension = rng.choice(long)
    cut = rng.randrange(1, length[dimension])
    first = (offset, replaced(length, dimension, cut))
    second = (
        replaced(offset, dimension, offset[dimension] + cut),
        replaced(length, dimension, length[dimension] - cut),
    )
    return split(first, rng, times - 1) + split(second, rng, times - 1)


def replaced(numbers: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*numbers[:place], number, *numbers[place + 1 :])


def part_of(length: tuple[int, ...], rng: random.Random) -> Box:
    """Any box inside one of that size; now and then an empty one."""
    low = tuple(rng.randrange(size) for size in length)
    least = 0 if rng.random() < 0.1 else 1
    return low, tuple(rng.randint(least, size - at) for size, at in zip(length, low, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(*box, strict=True))


def chunks_of(
    key: str, tensor: np.ndarray[Any, Any], boxes: Sequence[Box], item: int, rng: random.Random
) -> list[Chunk]:
    """The chunks of a tensor given as bytes [..., item], each with blocks of a size of its own."""
    return [
        Chunk(
            key,
            tensor[slices((offset, length))].tobytes(),
            ITEM[item],
            tensor.shape[:-1],
            offset,
            length,
            rank=number % 3,
            block=rng.choice([None, item, 3 * item, 7 * item, 64]),
        )
        for number, (offset, length) in enumerate(boxes)
    ]
