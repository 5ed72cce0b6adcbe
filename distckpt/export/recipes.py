"""What is to be exported, as the user says it, and as it travels to the process that makes the export."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from distckpt.checkpoint import Checkpoint
from distckpt.format import names
from distckpt.format.tree.keys import is_below

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP and activation checkpointing put into the names of parameters, and no checkpoint keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """How to make a deployable form of what a checkpoint holds below ``key``.

    Args:
        build: makes the plain, unsharded module; its values do not matter. It is called in another process, first on
            torch's meta device, and again on the CPU if something is left there that the checkpoint does not hold.
            None exports the weights alone.
        key: the module's place in the checkpoint: "model" for ``Checkpoint(model=...)``, "model.encoder" for a part.
        example_inputs: positional arguments for ``torch.export``; None writes no ``program.pt2``.
        example_kwargs: keyword arguments that go with them.
        dynamic_shapes: as ``torch.export.export`` takes it.
        config: what ``config.json`` says: a mapping that JSON can hold, or a Transformers configuration. None takes
            the built module's own, if it is a Transformers model.
        dtype: what floating-point weights are converted to; None leaves them as they are.

    Raises TypeError or ValueError for arguments that cannot work.
    """

    build: Callable[[], nn.Module] | None = None
    key: str = "model"
    example_inputs: tuple[Any, ...] | None = None
    example_kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    config: Any = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.build is not None and not callable(self.build):
            raise TypeError(f"build must be a callable that makes a module, not {type(self.build).__name__}")
        if self.example_inputs is not None and not isinstance(self.example_inputs, tuple):
            raise TypeError(f"example_inputs must be a tuple of arguments, not {type(self.example_inputs).__name__}")
        if self.example_inputs is not None and self.build is None:
            raise ValueError("example_inputs need build: a program is traced from a module, not from weights")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, not {self.dtype}")
        config_fields(self.config)


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """An Export with everything that must be known on the training side, ready to travel.

    ``tied`` maps names of weights to the one that they are the same as; known beforehand for a live module only.
    """

    name: str
    how: Export
    config: dict[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)


def recipes_of(checkpoint: Checkpoint, modules: Mapping[str, nn.Module | Export]) -> tuple[Recipe, ...]:
    """A recipe for each module to export. ValueError or TypeError for what cannot be exported as it was given."""
    for name in modules:
        if not names.is_name(name):
            raise ValueError(f"{name!r} cannot name an exported module: letters, digits, '.', '_' and '-' only")
    return tuple(_recipe(checkpoint, name, how) for name, how in modules.items())


def lacks_something(checkpoint: Checkpoint, key: str) -> bool:
    """Whether some of what the objects have below ``key`` is left out of checkpoints, as they are now."""
    name = key.partition(".")[0]
    module, chosen = checkpoint.objects[name], checkpoint.only_trainable
    is_chosen = chosen if isinstance(chosen, bool) else name in chosen
    if is_chosen and isinstance(module, nn.Module) and any(not one.requires_grad for one in module.parameters()):
        return True
    return any(is_below(key, text) or is_below(text, key) for text in checkpoint.exclude)


def _recipe(checkpoint: Checkpoint, name: str, how: nn.Module | Export) -> Recipe:
    if isinstance(how, nn.Module):
        return _recipe_of_module(checkpoint, name, how)
    if not isinstance(how, Export):
        raise TypeError(f"{name}: give an nn.Module or an Export, not {type(how).__name__}")
    if how.key.partition(".")[0] not in checkpoint.objects:
        raise ValueError(f"{name}: the checkpoint holds no object for the key {how.key!r}")
    inputs, kwargs = _on_cpu(how.example_inputs), _on_cpu(how.example_kwargs)
    config = config_fields(how.config)
    return Recipe(name, dataclasses.replace(how, example_inputs=inputs, example_kwargs=kwargs, config=None), config)


def _recipe_of_module(checkpoint: Checkpoint, name: str, module: nn.Module) -> Recipe:
    key = _key_of(checkpoint, module)
    if key is None:
        raise ValueError(f"{name}: this module is not an object of the checkpoint, or a part of one; give an Export")
    plain = _unwrapped(module)
    inputs = getattr(plain, "example_inputs", None)
    if inputs is not None and _is_sharded(plain):
        raise ValueError(
            f"{name}: a program is traced from a whole module, and this one is sharded. Give "
            f"Export(build=..., key={key!r}, example_inputs=...), where build makes the plain module"
        )
    build = None if inputs is None else functools.partial(copy.deepcopy, _without_weights(plain))
    return Recipe(name, Export(build, key, _on_cpu(inputs)), config_of(plain), tied_names(plain))


# ---- which module is meant ------------------------------------------------------------------------------------------


def _key_of(checkpoint: Checkpoint, module: nn.Module) -> str | None:
    wanted = _unwrapped(module)
    for name, obj in checkpoint.objects.items():
        if isinstance(obj, nn.Module):
            whole = _unwrapped(obj)
            for inside, part in whole.named_modules():
                if _unwrapped(part) is wanted:
                    return ".".join(filter(None, (name, _plain_name(inside))))
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_sharded(module: nn.Module) -> bool:
    wrapped = any(isinstance(part, FullyShardedDataParallel | FSDPModule) for part in module.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in module.parameters())


# ---- what is known of it --------------------------------------------------------------------------------------------


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of weights that are the very same as one before them, each with the name of that one."""
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, weight in _named_weights(module):
        plain = _plain_name(name)
        if first.setdefault(id(weight), plain) != plain:
            found[plain] = first[id(weight)]
    return found


def _named_weights(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def config_fields(config: Any) -> dict[str, Any] | None:
    """``config`` as what ``config.json`` will say. TypeError or ValueError for what JSON cannot hold."""
    if config is None:
        return None
    fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(fields, Mapping):
        raise TypeError(f"config must be a mapping or a Transformers configuration, not {type(config).__name__}")
    kept: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))
    return kept


def config_of(module: nn.Module) -> dict[str, Any] | None:
    """A Transformers model's own configuration, with the name of its class; None for any other module."""
    config = getattr(module, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return None
    fields = config_fields(config) or {}
    return {**fields, "architectures": fields.get("architectures") or [class_name(module)]}


def class_name(module: nn.Module) -> str:
    """The name of the module's class, as it was before FSDP made a class of its own from it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy that shares nothing: what a checkpoint holds is on the meta device, everything else on the CPU."""
    saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    replaced: dict[int, Any] = {}
    for _, tensor in _named_weights(module):
        if id(tensor) not in saved:
            replaced[id(tensor)] = tensor.detach().cpu().clone()
        elif isinstance(tensor, nn.Parameter):
            replaced[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
        else:
            replaced[id(tensor)] = tensor.detach().to("meta")
    return copy.deepcopy(module, replaced)


def _on_cpu(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu().clone(), inputs)
