"""Everything that can be seen of a run, as flat text: two runs are in the same state if their texts are equal."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

import distckpt
from tests.state.zoo.entry import Run

Facts = dict[str, str]

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def observe(run: Run) -> Facts:
    """The state of every object of the run, keyed by where it is."""
    facts: Facts = {}
    names = parameter_names(run)
    for name, value in run.checkpoint.objects.items():
        _look(name, value.obj if isinstance(value, distckpt.PerRank) else value, names, facts)
        held = run.objects[name]
        if isinstance(value, dict | list) and type(held) is type(value) and held is not value:
            facts[name] = "not the container that the program holds"
    describe("watch", run.watch(), facts)
    return facts


def differences(one: Facts, other: Facts) -> list[str]:
    """What differs, a line each."""
    both = [*one, *(key for key in other if key not in one)]
    differing = [key for key in both if one.get(key) != other.get(key)]
    return [f"{key}: {one.get(key, 'nothing')} != {other.get(key, 'nothing')}" for key in differing]


def parameter_names(run: Run) -> dict[int, str]:
    """The names of all parameters that any module of the run holds, by identity."""
    names: dict[int, str] = {}
    for name, value in run.checkpoint.objects.items():
        module = value.obj if isinstance(value, distckpt.PerRank) else value
        if isinstance(module, nn.Module):
            for key, parameter in module.named_parameters():
                names.setdefault(id(parameter), f"{name}.{plain_name(key)}")
        elif isinstance(module, torch.Tensor):
            names[id(module)] = name
    return names


def plain_name(key: str) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _look(path: str, value: Any, names: Mapping[int, str], facts: Facts) -> None:
    if isinstance(value, nn.Module):
        _look_at_module(path, value, facts)
    elif isinstance(value, torch.optim.Optimizer):
        _look_at_optimizer(path, value, names, facts)
    elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        _look_at_scheduler(path, value, facts)
    elif hasattr(value, "load_state_dict") and not isinstance(value, type):
        describe(f"{path}.state_dict", value.state_dict(), facts)
    else:
        describe(path, value, facts)


def _look_at_module(path: str, module: nn.Module, facts: Facts) -> None:
    first: dict[int, str] = {}
    both = [
        *(("parameter", key, value) for key, value in module.named_parameters(remove_duplicate=False)),
        *(("buffer", key, value) for key, value in module.named_buffers(remove_duplicate=False)),
    ]
    for what, key, value in both:
        name = plain_name(key)
        facts[f"{path}.{name}"] = f"{what} {text_of(value)} same as {first.setdefault(id(value), name)}"
    for key, child in module.named_modules():
        facts[f"{path}.{plain_name(key)}.training"] = str(child.training)
    for key, value in module.state_dict().items():
        if key.endswith("_extra_state"):
            describe(f"{path}.{plain_name(key)}", value, facts)


def _look_at_optimizer(path: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str], facts: Facts) -> None:
    seen = set()
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                describe(f"{path}.group{number}.{key}", value, facts)
        for at, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"{number}.{at}")
            seen.add(parameter)
            facts[f"{path}.group{number}.params.{at}"] = name
            describe(f"{path}.parameter.{name}", parameter, facts)
            if parameter in optimizer.state:
                describe(f"{path}.state.{name}", dict(optimizer.state[parameter]), facts)
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            describe(f"{path}.state.{key!r}", value, facts)


def _look_at_scheduler(path: str, scheduler: Any, facts: Facts) -> None:
    for key, value in vars(scheduler).items():
        if key in ("_schedulers", "schedulers"):
            for at, inner in enumerate(value):
                _look_at_scheduler(f"{path}.{at}", inner, facts)
        elif key not in ("optimizer", "lr_lambdas", "lr_lambda") and not callable(value) and "_ref" not in key:
            describe(f"{path}.{key}", value, facts)
    describe(f"{path}.state_dict", {k: v for k, v in scheduler.state_dict().items() if "schedulers" not in k}, facts)
    describe(f"{path}.get_last_lr", scheduler.get_last_lr(), facts)


def describe(path: str, value: Any, facts: Facts) -> None:
    """Everything about a tensor, a plain value, or a tree of them; types count."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        facts[path] = text_of(value)
    elif isinstance(value, np.ndarray):
        content = value.tobytes() if not value.dtype.hasobject else repr(value).encode()
        facts[path] = f"ndarray {value.dtype.descr} {value.shape} {_digest(content)}"
    elif isinstance(value, dict):
        extra = list(value) if isinstance(value, collections.OrderedDict) else ""
        factory = getattr(value, "default_factory", "")
        facts[path] = f"{kind} of {len(value)} {extra}{factory}"
        for key, item in value.items():
            describe(f"{path}.{key if type(key) is str else f'{type(key).__name__} {key!r}'}", item, facts)
    elif isinstance(value, list | tuple | collections.deque):
        facts[path] = f"{kind} of {len(value)} {getattr(value, 'maxlen', '')}"
        for at, item in enumerate(value):
            describe(f"{path}.{at}", item, facts)
    elif isinstance(value, set | frozenset):
        facts[path] = f"{kind} {sorted(f'{type(item).__name__} {item!r}' for item in value)}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        facts[path] = kind
        for field in dataclasses.fields(value):
            describe(f"{path}.{field.name}", getattr(value, field.name), facts)
    elif isinstance(value, torch.Generator):
        facts[path] = f"{kind} {text_of(value.get_state())}"
    elif isinstance(value, np.random.Generator):
        facts[path] = f"{kind} {value.bit_generator.state!r}"
    elif isinstance(value, np.random.RandomState):
        facts[path] = f"{kind} {value.get_state()!r}"
    elif isinstance(value, random.Random):
        facts[path] = f"{kind} {_digest(repr(value.getstate()).encode())}"
    elif isinstance(value, float) and math.isnan(value):
        facts[path] = f"{kind} nan"
    else:
        facts[path] = f"{kind} {value!r}"


def text_of(tensor: torch.Tensor) -> str:
    """Type, dtype, shape, layout, device, requires_grad and the bits."""
    if is_lazy(tensor):
        return f"{type(tensor).__name__} without a shape"
    kind = "DTensor" if isinstance(tensor, DTensor) else type(tensor).__name__
    head = f"{kind} {tensor.dtype} {_shape(tensor)} {tensor.layout} {tensor.device} grad={tensor.requires_grad}"
    return f"{head} {_bits(tensor.detach())}"


def _shape(tensor: torch.Tensor) -> Any:
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def _bits(tensor: torch.Tensor) -> str:
    if isinstance(tensor, DTensor):
        return _bits(tensor.full_tensor())
    if tensor.device.type == "meta":
        return "no bits"
    if tensor.is_nested:
        return " ".join(text_of(part) for part in tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        flat = tensor if tensor.is_coalesced() else tensor.coalesce()
        return f"coalesced={tensor.is_coalesced()} {text_of(flat.indices())} {text_of(flat.values())}"
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return f"{text_of(tensor.crow_indices())} {text_of(tensor.col_indices())} {text_of(tensor.values())}"
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return f"{text_of(tensor.ccol_indices())} {text_of(tensor.row_indices())} {text_of(tensor.values())}"
    if tensor.is_mkldnn:
        return _bits(tensor.to_dense())
    if tensor.is_quantized:
        if tensor.qscheme() in (
            torch.per_channel_affine,
            torch.per_channel_symmetric,
            torch.per_channel_affine_float_qparams,
        ):
            scales = f"{text_of(tensor.q_per_channel_scales())} {text_of(tensor.q_per_channel_zero_points())}"
            return f"{tensor.qscheme()} axis {tensor.q_per_channel_axis()} {scales} {_bits(tensor.int_repr())}"
        return f"{tensor.qscheme()} {tensor.q_scale()} {tensor.q_zero_point()} {_bits(tensor.int_repr())}"
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return f"{context!r} " + " ".join(f"{name}={text_of(getattr(tensor, name))}" for name in names)
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    shown = flat[:3].float().tolist() if flat.numel() and not flat.is_complex() else ""
    return f"{_digest(raw)} {shown}"


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
