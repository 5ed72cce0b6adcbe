"""Taking over a value in the object that is there already, so that whoever holds that object sees it."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch


def poured(old: Any, new: Any) -> Any:
    """``new``, in the containers, generators and dataclass instances of ``old`` where they are of the same type."""
    if new is old or type(new) is not type(old):
        return new
    if isinstance(old, dict):
        return _into_dict(old, new)
    if isinstance(old, list):
        old[:] = [poured(old[at] if at < len(old) else None, value) for at, value in enumerate(new)]
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
            setattr(old, part.name, poured(getattr(old, part.name, None), getattr(new, part.name)))
        return old
    return old if _take_state(old, new) else new


def _into_dict(old: Any, new: Any) -> Any:
    items = {key: poured(old.get(key), value) for key, value in new.items()}
    old.clear()
    for key, value in items.items():
        old[key] = value
    if isinstance(old, defaultdict):
        old.default_factory = new.default_factory
    return old


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
