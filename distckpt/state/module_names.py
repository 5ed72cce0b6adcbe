"""The names of a module's parts, free of what wraps it: DDP, DataParallel, torch.compile, activation checkpointing."""

from __future__ import annotations

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile's; its module takes long to import
    "ActivationWrapper": "_checkpoint_wrapped_module",
}
"""Classes of torch that stand around one module, and under which name they hold it."""


def unwrapped(module: torch.nn.Module, name: str) -> str:
    """``name``, as ``module.state_dict()`` or ``named_parameters()`` says it, without the steps into wrapped modules."""
    steps, found, at = name.split("."), list[str](), 0
    node: torch.nn.Module | None = module
    while node is not None and at < len(steps):
        inside = _inside(node)
        if inside is None:
            found.append(steps[at])
            node = _child(node, steps[at])
            at += 1
        else:
            # Activation wrappers take their own step out of state dicts, and leave it in the names of parameters.
            at += steps[at] == inside
            node = node._modules[inside]
    return ".".join([*found, *steps[at:]])


def wrapped(module: torch.nn.Module, name: str) -> str:
    """``name`` as ``module.load_state_dict()`` takes it: ``unwrapped`` turned round."""
    found: list[str] = []
    node: torch.nn.Module | None = module
    for step in name.split("."):
        while node is not None and (inside := _inside(node)) is not None:
            if not isinstance(node, ActivationWrapper):  # whose own hook puts the step in
                found.append(inside)
            node = node._modules[inside]
        found.append(step)
        node = _child(node, step) if node is not None else None
    return ".".join(found)


def _child(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    return module._modules[name] if name in module._modules else None  # noqa: SIM401 - a ScriptModule's has no get


def _inside(module: torch.nn.Module) -> str | None:
    """Under which name a wrapper holds what it wraps; None if ``module`` is no wrapper."""
    for kind in type(module).__mro__:
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute is not None and kind.__module__.startswith("torch.") and attribute in module._modules:
            return attribute if module._modules[attribute] is not None else None
    return None
