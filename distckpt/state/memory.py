"""What is asked of the memory of tensors and arrays: whether it can be filled, and which of them share it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from distckpt.sharding.chunks import local_tensor

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of tensors that are nothing but memory with a dtype and strides."""


Stretch = tuple[int, int, Any]
"""The addresses where it begins and ends, and what tells it from others there: its strides, if it has gaps. Of a tensor
without memory of its own both are 0, and it is told by its identity."""


class Stretches:
    """Stretches of one storage; ``overlap`` once two of them have had a part in common."""

    def __init__(self) -> None:
        self.overlap = False
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, stretch: Stretch) -> None:
        """One more."""
        begin, end, _ = stretch
        if begin == end or self.overlap:
            return
        at = bisect_left(self._begins, end)
        self.overlap = at > 0 and self._ends[at - 1] > begin
        self._begins.insert(at, begin)
        self._ends.insert(at, end)


def stretch_of(tensor: torch.Tensor) -> Stretch:
    """The memory of a tensor, or of this rank's part of it."""
    try:
        local = local_tensor(tensor)
    except ValueError:
        return 0, 0, id(tensor)
    begin = local.data_ptr()
    if not local.numel() or not begin:
        return 0, 0, id(tensor)
    reach = _last(local) + 1
    return begin, begin + reach * local.itemsize, local.stride() if reach > local.numel() else ()


def writable(array: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether it can be filled in place: each element has memory of its own, and may be changed."""
    if isinstance(array, np.ndarray):
        return array.flags.writeable and all(stride > 0 for stride in array.strides) and not overlaps(array)
    return not (array.is_inference() or array.is_conj() or array.is_neg() or overlaps(array))


def overlaps(array: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether two of its elements may share memory, as after ``expand``."""
    if isinstance(array, DTensor):
        return False
    strides, item = (array.strides, array.itemsize) if isinstance(array, np.ndarray) else (array.stride(), 1)
    reach = 0
    # Along the dimensions from the densest on, each must step over the last.
    for stride, size in sorted(
        (stride // item, size) for stride, size in zip(strides, array.shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def is_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two plain tensors are of one dtype and shape, and equal to the bit."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    mine, theirs = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(mine, theirs)


def is_freed(tensor: torch.Tensor) -> bool:
    """Whether the storage of a plain tensor has been made smaller than the tensor is."""
    if not tensor.numel() or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() < (tensor.storage_offset() + _last(tensor) + 1) * tensor.itemsize


def _last(tensor: torch.Tensor) -> int:
    """How many elements after its first one the last one is."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def storage_of(array: torch.Tensor | np.ndarray[Any, Any]) -> int:
    """Where the memory begins that it shares with all other views."""
    if isinstance(array, np.ndarray):
        tensor = torch.from_numpy(array) if writable(array) else None
        return id(array) if tensor is None else tensor.untyped_storage().data_ptr()
    try:
        return local_tensor(array).untyped_storage().data_ptr() or id(array)
    except (ValueError, RuntimeError):
        return id(array)  # a sparse one, say, or one that is made of others


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same elements at the same addresses. Two without memory yet, on meta, count as that."""
    if is_lazy(one) or is_lazy(other) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta:
        return True  # it has none yet, and will be refused for that
    try:
        mine, theirs = local_tensor(one), local_tensor(other)
    except ValueError:
        return False
    return mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
