"""Whether two trees are the same in every bit."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch


def same(left: Any, right: Any) -> bool:
    """Equal in structure, order, types, and every bit of every tensor and float."""
    return bool(exact(left) == exact(right))


def exact(value: Any) -> object:
    """Something to compare: value, type, order, and every bit of a float or a tensor."""
    kind = type(value)
    if isinstance(value, list | tuple):
        return kind, [exact(item) for item in value]
    if isinstance(value, dict):
        return kind, [exact(pair) for pair in value.items()]
    if kind in (set, frozenset):
        return kind, sorted((exact(item) for item in value), key=repr)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, exact(value.real), exact(value.imag)
    if isinstance(value, torch.Tensor):
        return kind, value.dtype, value.shape, value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.str_ | np.bytes_):
        return kind, value.item()  # NumPy gives an empty one bytes that are not its own
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    return kind, value
