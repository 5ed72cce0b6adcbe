"""Whose code has a say in what a module saves and loads: torch's, which is known here, or the module's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def is_saved_by_torch(module: torch.nn.Module) -> bool:
    """Whether no code but torch's has a say in its state dict."""
    return all(map(is_of_torch, _saving_code(module)))


def _saving_code(module: torch.nn.Module) -> Iterator[Any]:
    """The code that makes the state dict, which may look at anything if it is not torch's."""
    for part in module.modules():
        yield from part._state_dict_hooks.values()
        yield from part._state_dict_pre_hooks.values()
        yield from (getattr(part, name) for name in ("state_dict", "_save_to_state_dict", "get_extra_state"))


def is_of_torch(code: Any) -> bool:
    """Whether a hook or method is one of torch's, which only copies what is there into its place.

    The one of weight_norm takes what its older form has saved, and makes other names of it.
    """
    inside = getattr(code, "hook", code)  # torch keeps its own pre-hooks in an object around them
    inside = getattr(inside, "func", inside)
    home = str(getattr(inside, "__module__", None) or type(inside).__module__)
    if home == "torch.nn.utils.parametrizations":
        return False
    return (
        home.startswith(("torch.nn.", "torch.distributed.", "torch._dynamo.", "torch.fx."))
        or home == "torch.optim.swa_utils"
    )
