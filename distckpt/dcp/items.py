"""What a planner of DCP hands over, as rows that can be written: tensors as their bytes, all else as typed values.

Nothing is pickled. DCP's planner makes bytes of what is no tensor by ``torch.save``; so it is asked for the object itself.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from distckpt.dcp.view import is_entered
from distckpt.errors import EncodeError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.limits import MAX_DIMENSIONS
from distckpt.format.tree.tree import ArrayStep, DictStep, ListStep, Path, encode_path, flatten
from distckpt.format.tree.values import encode_value
from distckpt.sharding.chunks import dtype_name, local_tensor
from distckpt.sharding.description import Row
from distckpt.state.collector import as_tensor
from distckpt.state.memory import is_freed
from distckpt.state.objects import is_array


@dataclass(slots=True)
class Items:
    """The rows of one rank; for each either a source tensor or a value's bytes, and the other is None."""

    rows: list[Row] = field(default_factory=list)
    sources: list[torch.Tensor | None] = field(default_factory=list)
    values: list[bytes | None] = field(default_factory=list)

    def add(self, row: Row, source: torch.Tensor | None = None, value: bytes | None = None) -> None:
        """One more row."""
        self.rows.append(row)
        self.sources.append(source)
        self.values.append(value)


def items_of(plan: SavePlan, planner: SavePlanner) -> Items:
    """All that the plan has this rank write. EncodeError names the key of what cannot be stored without pickle.

    A key is what DCP calls it, and its path what the planner says of where it was in the nested state dict.
    """
    paths = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
    items = Items()
    for item in plan.items:
        key = item.index.fqn
        path = _path(paths.get(key, (key,)))
        if item.type == WriteItemType.BYTE_IO:
            _add_object(items, _object(item, planner), path)
        else:
            _add_tensor(items, item, planner.resolve_data(item), path)
    return items


def _path(steps: Iterable[Any]) -> Path:
    return tuple(ListStep(step) if type(step) is int else DictStep(str(step)) for step in steps)


# ---- tensors --------------------------------------------------------------------------------------------------------


def _add_tensor(items: Items, item: WriteItem, resolved: Any, path: Path) -> None:
    key, data = item.index.fqn, item.tensor_data
    if data is None or not isinstance(resolved, torch.Tensor):
        raise EncodeError(key, f"the planner plans a tensor and hands over a {type(resolved).__name__}")
    offset, length = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    if tuple(resolved.shape) != length:
        raise EncodeError(
            key, f"the planner plans a part of shape {list(length)} and hands over one of {list(resolved.shape)}"
        )
    _add_part(items, key, path, resolved, (tuple(data.size), offset, length))


Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The shape of the whole tensor, and offset and length of a part."""


def _add_part(items: Items, key: str, path: Path, array: Any, place: Place) -> None:
    shape, offset, length = place
    if 0 in shape:
        if any(offset):
            return  # of a tensor without elements the first rank has all there is
        length, array = shape, array.new_empty(shape)
    elif 0 in length:
        return
    try:
        source = local_tensor(as_tensor(array, key))
        name = dtype_name(source.dtype)
    except ValueError as error:
        raise EncodeError(key, str(error)) from error
    if len(shape) > MAX_DIMENSIONS:
        raise EncodeError(key, f"the tensor has {len(shape)} dimensions, and {MAX_DIMENSIONS} is the most")
    if is_freed(source):
        raise EncodeError(key, "the memory of the tensor has been freed (resize_(0) of its storage)")
    nbytes = math.prod(length) * source.element_size()
    items.add(Row(key, encode_path(path), name, shape, offset, length, nbytes), source=source)


# ---- everything else ------------------------------------------------------------------------------------------------


def _object(item: WriteItem, planner: SavePlanner) -> Any:
    """The object itself, of which the planner would make bytes."""
    key = item.index.fqn
    if not isinstance(planner, DefaultSavePlanner):
        raise EncodeError(
            key,
            f"it is no tensor, and {type(planner).__name__} hands over bytes that it has made of it. Derive the planner from "
            "torch's DefaultSavePlanner, whose lookup_object gives the object, or make a tensor of it",
        )
    found = planner.lookup_object(item.index)
    if not _is_as_torch_saves(item, planner, found):
        raise EncodeError(
            key,
            f"{type(planner).__name__} has a way of its own to make bytes of what is no tensor, which no reader would know. "
            "Change the state dict before it is saved instead",
        )
    if is_entered(found) and found:
        raise EncodeError(
            key,
            "the planner does not flatten the dicts and lists of the state dict: use flatten_state_dict=True, which is "
            "what planners do by default",
        )
    return found


def _is_as_torch_saves(item: WriteItem, planner: DefaultSavePlanner, found: Any) -> bool:
    """Whether the planner does with the object what torch's does."""
    kind = type(planner)
    if (
        kind.resolve_data is DefaultSavePlanner.resolve_data
        and kind.transform_object is DefaultSavePlanner.transform_object
    ):
        return True
    usual, mine = DefaultSavePlanner.transform_object(planner, item, found), planner.resolve_data(item)
    return isinstance(mine, io.BytesIO) and mine.getvalue() == usual.getvalue()


def _add_object(items: Items, found: Any, path: Path) -> None:
    """As many rows as there are leaves: an array inside, of a tuple say, is written as an array."""
    for leaf in flatten(found, is_array, path):
        if not is_array(leaf.value):
            row = Row(leaf.key, encode_path(leaf.path), VALUE, (), (), (), 0)
            items.add(row, value=encode_value(leaf.value, leaf.key))
            continue
        if isinstance(leaf.value, DTensor):
            raise EncodeError(
                leaf.key,
                f"a DTensor inside of a {type(found).__name__}, which DCP takes as one value: use a dict or list",
            )
        shape = tuple(leaf.value.shape)
        inner = (*leaf.path, ArrayStep()) if isinstance(leaf.value, np.ndarray) else leaf.path
        _add_part(items, leaf.key, inner, leaf.value, (shape, (0,) * len(shape), shape))
