"""From a checkpoint's tensors to a module that holds them, and from the module to a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distckpt.export.recipes import Export, tied_names


def built_on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """The module without memory for its weights; None if it cannot be built so."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # it looks at values, which nothing on the meta device has
        return None


def filled(build: Callable[[], nn.Module], state: Mapping[str, Any]) -> nn.Module:
    """The module with these values, for inference: nothing is trained, and weights that are tied stay so.

    RuntimeError, as ``load_state_dict`` has it, if module and state do not have the same keys and shapes.
    """
    module = built_on_meta(build)
    if module is not None:
        _fill(module, state)
    if module is None or _has_meta(module):
        module = build()
        _fill(module, state)
    return module.eval().requires_grad_(False)


def traced(module: nn.Module, how: Export) -> torch.export.ExportedProgram:
    """The program of a filled module. ValueError if part of it has no values; torch's errors if it cannot be traced."""
    program = torch.export.export(
        module,
        how.example_inputs or (),
        dict(how.example_kwargs or {}),
        dynamic_shapes=how.dynamic_shapes,
        strict=False,
    )
    held = {**program.state_dict, **program.constants}
    empty = [name for name, value in held.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        raise ValueError(f"the module keeps tensors where no checkpoint and no buffer is: {', '.join(empty)}")
    return program


def _fill(module: nn.Module, state: Mapping[str, Any]) -> None:
    tied = tied_names(module)
    module.load_state_dict(dict(state), assign=True)
    for name, same in tied.items():
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, _attribute(module, same))


def _attribute(module: nn.Module, name: str) -> Any:
    parent, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(parent), attribute)


def _has_meta(module: nn.Module) -> bool:
    """Whether anything is without values: a weight, a buffer, or a tensor among the module's plain attributes."""
    leaves = (leaf for part in module.modules() for leaf in tree_leaves(vars(part)))
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves)
