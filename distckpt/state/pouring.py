"""Taking over a value in the object that is there already, so that whoever holds that object sees it."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch

from distckpt.sharding.chunks import local_tensor
from distckpt.state.memory import is_same_bits

Poured = dict[int, tuple[Any, Any]]
"""What has gone into which object, by the identity of that: the object, and what went into it."""


def poured(old: Any, new: Any, before: Poured) -> Any:
    """``new``, in the containers, generators and dataclass instances of ``old`` where they are of the same type.

    One that is in several places of ``old`` stays so if they all take the same. ``before`` grows by what goes into which.
    """
    if new is old or type(new) is not type(old):
        return new
    if _is_mutable(old):
        if id(old) in before:
            return old if is_same(before[id(old)][1], new) else new
        before[id(old)] = (old, new)
    if isinstance(old, dict):
        return _into_dict(old, new, before)
    if isinstance(old, list):
        old[:] = [poured(old[at] if at < len(old) else None, value, before) for at, value in enumerate(new)]
        return old
    if type(old) is deque and old.maxlen == new.maxlen:
        old.clear()
        old.extend(new)
        return old
    if type(old) is set:
        old.clear()
        old.update(new)
        return old
    if type(old) is bytearray:
        old[:] = new
        return old
    if dataclasses.is_dataclass(old) and not _is_frozen(old):
        for part in dataclasses.fields(old):
            setattr(old, part.name, poured(getattr(old, part.name, None), getattr(new, part.name), before))
        return old
    return old if _take_state(old, new) else new


def _into_dict(old: Any, new: Any, before: Poured) -> Any:
    items = {key: poured(old.get(key), value, before) for key, value in new.items()}
    old.clear()
    for key, value in items.items():
        old[key] = value
    if isinstance(old, defaultdict):
        old.default_factory = new.default_factory
    return old


def is_same(one: Any, other: Any) -> bool:
    """Whether two trees are equal in types, order and every bit."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return is_same_bits(local_tensor(one), local_tensor(other))
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            is_same(*keys) and is_same(one[keys[0]], other[keys[1]]) for keys in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(is_same, one, other))
    if dataclasses.is_dataclass(one):
        return all(is_same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return repr(one) == repr(other) if isinstance(one, float | complex) else bool(one == other)


def _is_mutable(old: Any) -> bool:
    return isinstance(old, dict | list | set | deque | bytearray) or dataclasses.is_dataclass(old)


def _is_frozen(value: Any) -> bool:
    return bool(type(value).__dataclass_params__.frozen)


def _take_state(old: Any, new: Any) -> bool:
    """Put a random number generator where the other is; False if it is none."""
    if isinstance(old, torch.Generator):
        if old.device != new.device:
            return False
        old.set_state(new.get_state())
    elif isinstance(old, np.random.Generator):
        if type(old.bit_generator) is not type(new.bit_generator):
            return False
        old.bit_generator.state = new.bit_generator.state
    elif isinstance(old, np.random.BitGenerator):
        old.state = new.state
    elif isinstance(old, np.random.RandomState):
        old.set_state(new.get_state(legacy=False))
    elif isinstance(old, random.Random):
        old.setstate(new.getstate())
    else:
        return False
    return True
