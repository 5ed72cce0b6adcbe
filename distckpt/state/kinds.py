"""Which kind of object each object of a checkpoint is. A new kind is a file of its own and a line here."""

from __future__ import annotations

from typing import Any

import torch

from distckpt.format.tree.tree import DictStep, Path, RankStep
from distckpt.state import optimizer
from distckpt.state.kind import Kind, Place, Surroundings
from distckpt.state.module import ModuleState
from distckpt.state.named_modules import NamedModules
from distckpt.state.objects import NamedObjects, PerRank, declared_in, is_stateful, wrapped_in
from distckpt.state.optimizer import OptimizerState
from distckpt.state.per_rank import PerRankState
from distckpt.state.stateful import StatefulState
from distckpt.state.tree import TreeState


def surroundings_of(checkpoint: NamedObjects, rank: int, world_size: int) -> Surroundings:
    """What is around each of the objects."""
    inside = {name: wrapped_in(obj) for name, obj in checkpoint.objects.items()}
    modules = {name: obj for name, obj in inside.items() if isinstance(obj, torch.nn.Module)}
    return Surroundings(rank, world_size, NamedModules(modules))


def kinds_of(checkpoint: NamedObjects, around: Surroundings) -> dict[str, Kind]:
    """Every object by its name, as what it is now."""
    return {name: _kind_of(checkpoint, name, obj, around) for name, obj in checkpoint.objects.items()}


def optimizers_of(checkpoint: NamedObjects) -> list[torch.optim.Optimizer]:
    """Every optimizer among the objects, inside a PerRank too."""
    return [obj for obj in map(wrapped_in, checkpoint.objects.values()) if isinstance(obj, torch.optim.Optimizer)]


def makeup_of(obj: Any) -> tuple[Any, ...]:
    """The objects that decide into which sections it is taken apart.

    A container, a tensor or a plain value is read as it stands, whichever object it is.
    """
    if not is_stateful(obj) and not isinstance(obj, PerRank):
        return (None,)
    return (obj, *(optimizer.makeup_of(obj) if isinstance(obj, torch.optim.Optimizer) else ()))


def _kind_of(checkpoint: NamedObjects, name: str, obj: Any, around: Surroundings) -> Kind:
    prefix: Path = (DictStep(name),)
    declared = declared_in(checkpoint, name)
    if isinstance(obj, PerRank):
        place = Place((*prefix, RankStep(around.rank)), lambda: obj.obj, lambda value: setattr(obj, "obj", value))
        return PerRankState(obj, prefix, around, _plain_kind(place, around, declared))
    place = Place(prefix, lambda: checkpoint.objects[name], lambda value: checkpoint.replace(name, value))
    return _plain_kind(place, around, declared)


def _plain_kind(place: Place, around: Surroundings, declared: frozenset[Path]) -> Kind:
    obj = place.get()
    if isinstance(obj, torch.nn.Module):
        return ModuleState(obj, place.prefix)
    if isinstance(obj, torch.optim.Optimizer):
        return OptimizerState(obj, place.prefix, around.modules)
    if is_stateful(obj):
        return StatefulState(obj, place.prefix)
    return TreeState(place, declared)
