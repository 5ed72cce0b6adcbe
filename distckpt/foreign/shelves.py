"""The bytes of tensors in other programs' files, as an index has them that our own reader can go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.foreign.contents import Held, Spread
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


def shelved(tensors: Mapping[str, Held | Spread], path: str) -> list[Shelved]:
    """An index of all of them, for each store one. A tensor with strides is one row of all elements that it reaches over.

    ValueError for one whose parts are in several stores.
    """
    stores: dict[str, tuple[Store, dict[str, Held | Spread]]] = {}
    for key, held in tensors.items():
        found = {part.file.store.url: part.file.store for _, part in held.parts}
        if len(found) > 1:
            raise ValueError(f"{path}: the parts of {key} are in several places: {', '.join(found)}")
        for url, store in found.items():
            stores.setdefault(url, (store, {}))[1][key] = held
    return [_shelved(store, found, path) for store, found in stores.values()]


def _shelved(store: Store, tensors: Mapping[str, Held | Spread], path: str) -> Shelved:
    paths = dict.fromkeys(part.file.path for held in tensors.values() for _, part in held.parts)
    files = {file: number for number, file in enumerate(paths)}
    names = list(files)
    return Shelved(Shelf(store, "", path, lambda _, number: names[number]), _index(tensors, files))


def _index(tensors: Mapping[str, Held | Spread], files: Mapping[str, int]) -> Index:
    held = list(tensors.values())
    shapes = [(one.span,) if isinstance(one, Held) and one.strides is not None else one.shape for one in held]
    width = max(map(len, shapes), default=1) or 1
    rows = [
        (
            number,
            (0,) if one.strides is not None else offset,
            shapes[number] if one.strides is not None else part.shape,
            part,
        )
        for number, one in enumerate(held)
        for offset, part in one.parts
    ]
    key = np.array([number for number, *_ in rows], np.int64)
    offset, length = _padded([row[1] for row in rows], width, 0), _padded([row[2] for row in rows], width, 1)
    items = np.array([ITEM_SIZES[one.dtype] for one in held], np.int64)
    size = length.prod(axis=1) * items[key]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(1, -(-size // BLOCK)))])
    return Index(
        names=tuple(tensors),
        paths=tuple(tensors),
        dtypes=tuple(one.dtype for one in held),
        item_sizes=items,
        ndims=np.array([len(shape) for shape in shapes], np.int64),
        shapes=_padded(shapes, width, 1),
        key=key,
        offset=offset,
        length=length,
        rank=np.zeros(len(rows), np.int64),
        shard=np.array([files[part.file.path] for *_, part in rows], np.int64),
        position=np.array([part.position for *_, part in rows], np.int64),
        size=size,
        block=np.full(len(rows), BLOCK, np.int64),
        starts=starts,
        blocks=np.broadcast_to(np.uint32(0), (int(starts[-1]),)),  # takes no memory
        ids={name: number for number, name in enumerate(tensors)},
        grouped=np.arange(len(rows)),
        groups=np.searchsorted(key, np.arange(len(held) + 1)),
        has_sums=False,
    )


def _padded(tuples: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    found = [(*one, *(fill,) * (width - len(one))) for one in tuples]
    return np.array(found, dtype=np.int64).reshape(len(tuples), width)
