"""The bytes of tensors in other programs' files, as an index has them that our own reader can go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distckpt.foreign.contents import Held
from distckpt.format.arrays import Ints
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.format.arrow.index import Index
from distckpt.state.tensors import Shelf
from distckpt.storage import Store

BLOCK = 4096
"""What is read together at least: whole pages."""


@dataclass(frozen=True, slots=True)
class Shelved:
    """Where tensors of one store lie, and what of them is where."""

    shelf: Shelf
    index: Index


def shelved(tensors: Mapping[str, Held], path: str) -> list[Shelved]:
    """An index of all of them, for each store one. A tensor with strides is one row of all elements that it reaches over."""
    stores: dict[str, tuple[Store, dict[str, Held]]] = {}
    for key, held in tensors.items():
        stores.setdefault(held.file.store.url, (held.file.store, {}))[1][key] = held
    return [_shelved(store, found, path) for store, found in stores.values()]


def _shelved(store: Store, tensors: Mapping[str, Held], path: str) -> Shelved:
    files = {file: number for number, file in enumerate(dict.fromkeys(held.file.path for held in tensors.values()))}
    names = list(files)
    return Shelved(Shelf(store, "", path, lambda _, number: names[number]), _index(tensors, files))


def _index(tensors: Mapping[str, Held], files: Mapping[str, int]) -> Index:
    held = list(tensors.values())
    shapes = [one.shape if one.strides is None else (one.span,) for one in held]
    width = max(map(len, shapes), default=1) or 1
    padded = np.array([(*shape, *(1,) * (width - len(shape))) for shape in shapes], np.int64).reshape(len(held), width)
    items = np.array([ITEM_SIZES[one.dtype] for one in held], np.int64)
    size = padded.prod(axis=1) * items
    blocks = np.maximum(1, -(-size // BLOCK))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
    rows = np.arange(len(held))
    return Index(
        names=tuple(tensors),
        paths=tuple(tensors),
        dtypes=tuple(one.dtype for one in held),
        item_sizes=items,
        ndims=np.array([len(shape) for shape in shapes], np.int64),
        shapes=padded,
        key=rows,
        offset=np.zeros_like(padded),
        length=padded,
        rank=np.zeros(len(held), np.int64),
        shard=np.array([files[one.file.path] for one in held], np.int64),
        position=np.array([one.position for one in held], np.int64),
        size=size,
        block=_filled(len(held), BLOCK),
        starts=starts,
        blocks=np.broadcast_to(np.uint32(0), (int(starts[-1]),)),  # takes no memory
        ids={key: number for number, key in enumerate(tensors)},
        grouped=rows,
        groups=np.arange(len(held) + 1),
        has_sums=False,
    )


def _filled(count: int, value: int) -> Ints:
    return np.full(count, value, dtype=np.int64)
