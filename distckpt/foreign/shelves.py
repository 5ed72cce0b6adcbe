"""The bytes of tensors in other programs' files, as an index has them that our own reader can go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.foreign.contents import Held, Part
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
    rows = [(number, part) for number, held in enumerate(tensors.values()) for part in _parts(held)]
    files = {file: number for number, file in enumerate(dict.fromkeys(part.file.path for _, part in rows))}
    names = list(files)
    return Shelved(Shelf(store, "", path, lambda _, number: names[number]), _index(tensors, rows, files))


def _parts(held: Held) -> tuple[Part, ...]:
    shape = held.shape if held.strides is None else (held.span,)
    return held.parts or (Part((0,) * len(shape), shape, held.file, held.position),)


def _index(tensors: Mapping[str, Held], rows: Sequence[tuple[int, Part]], files: Mapping[str, int]) -> Index:
    held = list(tensors.values())
    shapes = [one.shape if one.strides is None else (one.span,) for one in held]
    width = max(map(len, shapes), default=1) or 1
    items = np.array([ITEM_SIZES[one.dtype] for one in held], np.int64)
    key = np.array([number for number, _ in rows], np.int64)
    length = _padded([part.length for _, part in rows], width, 1)
    size = length.prod(axis=1) * items[key]
    blocks = np.maximum(1, -(-size // BLOCK))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
    return Index(
        names=tuple(tensors),
        paths=tuple(tensors),
        dtypes=tuple(one.dtype for one in held),
        item_sizes=items,
        ndims=np.array([len(shape) for shape in shapes], np.int64),
        shapes=_padded(shapes, width, 1),
        key=key,
        offset=_padded([part.offset for _, part in rows], width, 0),
        length=length,
        rank=np.zeros(len(rows), np.int64),
        shard=np.array([files[part.file.path] for _, part in rows], np.int64),
        position=np.array([part.position for _, part in rows], np.int64),
        size=size,
        block=_filled(len(rows), BLOCK),
        starts=starts,
        blocks=np.broadcast_to(np.uint32(0), (int(starts[-1]),)),  # takes no memory
        ids={key: number for number, key in enumerate(tensors)},
        grouped=np.arange(len(rows)),
        groups=np.searchsorted(key, np.arange(len(held) + 1)),
        has_sums=False,
    )


def _padded(boxes: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    rows = [(*box, *(fill,) * (width - len(box))) for box in boxes]
    return np.array(rows, np.int64).reshape(len(rows), width)


def _filled(count: int, value: int) -> Ints:
    return np.full(count, value, dtype=np.int64)
