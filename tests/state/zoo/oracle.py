"""Restoring as torch does it: what distckpt is held against."""

from __future__ import annotations

import copy
import io
import random
import warnings
from typing import Any

import numpy as np
import torch

import distckpt
from tests.state.zoo.entry import Run


def restore_by_torch(source: Run, twin: Run) -> None:
    """``load_state_dict(state_dict())`` for what has it, generators by their states, everything else as a copy."""
    for name, saved in source.checkpoint.objects.items():
        _restore_one(twin.checkpoint, name, saved)


def _restore_one(checkpoint: distckpt.Checkpoint, name: str, saved: Any) -> None:
    mine = checkpoint.objects[name]
    if isinstance(saved, distckpt.PerRank):
        saved, holder = saved.obj, mine
        mine = holder.obj
        if not _loaded(mine, saved):
            holder.obj = poured(mine, written_and_read(saved))
    elif not _loaded(mine, saved):
        checkpoint.replace(name, poured(mine, written_and_read(saved)))


def _loaded(mine: Any, saved: Any) -> bool:
    if isinstance(mine, type) or not hasattr(mine, "load_state_dict"):
        return set_generator(mine, saved)
    mine.load_state_dict(copied(saved.state_dict()))
    return True


def copied(state: Any) -> Any:
    """A deep copy that no autograd history can prevent."""
    if isinstance(state, dict):
        made = copy.copy(state)
        for key, value in state.items():
            made[key] = copied(value)
        return made
    if isinstance(state, torch.Tensor) and type(state) in (torch.Tensor, torch.nn.Parameter):
        return copy.deepcopy(state.detach())
    if isinstance(state, torch.Tensor):
        return written_and_read(state.detach())
    return copy.deepcopy(state)


def written_and_read(value: Any) -> Any:
    """A copy by ``torch.save``: subclasses and odd layouts need not know how to clone, but all can be written."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, file, pickle_protocol=4)  # older protocols lose byte order and fold
        file.seek(0)
        return torch.load(file, weights_only=False)


def set_generator(mine: Any, saved: Any) -> bool:
    """Put a random number generator where the other is; False if it is none."""
    if isinstance(mine, torch.Generator):
        mine.set_state(saved.get_state())
    elif isinstance(mine, np.random.Generator):
        mine.bit_generator.state = copy.deepcopy(saved.bit_generator.state)
    elif isinstance(mine, np.random.RandomState):
        mine.set_state(saved.get_state())
    elif isinstance(mine, random.Random):
        mine.setstate(saved.getstate())
    else:
        return False
    return True


def poured(mine: Any, value: Any) -> Any:
    """``value``, in the container that the program holds already where that is one; its generators stay its own."""
    if isinstance(mine, dict) and isinstance(value, dict) and type(mine) is type(value):
        held = dict(mine)
        mine.clear()
        for key, item in value.items():
            mine[key] = poured(held[key], item) if key in held else item
        return mine
    if isinstance(mine, list) and type(value) is type(mine):
        mine[:] = [poured(mine[at], item) if at < len(mine) else item for at, item in enumerate(value)]
        return mine
    if _same_form(mine, value):
        with torch.no_grad():
            mine.copy_(value)
        return mine
    return mine if set_generator(mine, value) else value


def _same_form(mine: Any, value: Any) -> bool:
    """Whether a tensor that the program holds can take the value in its own memory."""
    if not (isinstance(mine, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    if (
        mine.is_inference()
        or mine.layout != torch.strided
        or value.layout != torch.strided
        or mine.is_quantized
        or mine.is_nested
    ):
        return False
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(mine.stride(), mine.shape, strict=True))
    return mine.shape == value.shape and mine.dtype == value.dtype and not overlapping
