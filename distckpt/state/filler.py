"""Filling live objects from a checkpoint, whatever number of ranks wrote it: only what this rank holds is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from distckpt.directory.locate import Located
from distckpt.errors import DamagedError, MismatchError, ResizeError
from distckpt.format.arrow.index import Index
from distckpt.format.tree.tree import DictStep, KeyStep, Path, RankStep, Step, decode_path, flatten, key_of, unflatten
from distckpt.sharding.chunks import dtype_from_name, global_shape
from distckpt.state.collector import is_array, is_stateful, model_tree, optimizer_tree
from distckpt.state.objects import SAVE_COUNTER, NamedObjects, PerRank
from distckpt.state.tensors import read_tensors, read_values


class LoadStatus:
    """How a restore matched keys. ``path`` is the checkpoint; the assertions return the status itself."""

    def __init__(self, path: str, missing: Sequence[str], unexpected: Sequence[str], matched: int = 0) -> None:
        self.path = path
        self.missing = tuple(missing)
        """Keys of the objects that the checkpoint does not have: they were left as they were."""
        self.unexpected = tuple(unexpected)
        """Keys of the checkpoint that no object asked for."""
        self.matched = matched
        """How many keys of the checkpoint objects did ask for."""

    def assert_consumed(self) -> LoadStatus:
        """Raise MismatchError unless every key on either side found its other half."""
        if self.missing or self.unexpected:
            raise MismatchError(self.path, self.missing, self.unexpected, {})
        return self

    def assert_existing_objects_matched(self) -> LoadStatus:
        """Raise MismatchError if an object has a key that the checkpoint lacks; extra keys there are fine."""
        if self.missing:
            raise MismatchError(self.path, self.missing, (), {})
        return self

    def assert_nontrivial_match(self) -> LoadStatus:
        """Raise MismatchError if no object has found anything in the checkpoint."""
        if not self.matched:
            raise MismatchError(self.path, self.missing, self.unexpected, {})
        return self

    def expect_partial(self) -> LoadStatus:
        """Say that a partial match is meant."""
        return self

    def __repr__(self) -> str:
        return f"LoadStatus({self.path!r}, missing={len(self.missing)}, unexpected={len(self.unexpected)})"


@dataclass(slots=True)
class _Filling:
    """What one restore is about to do: tensors to fill, values to read, and what to tell the objects afterwards."""

    where: Located
    index: Index
    rank: int
    world_size: int
    modules: Mapping[str, torch.nn.Module]
    saved: dict[str, Path]
    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)
    finish: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)


def restore_objects(checkpoint: NamedObjects, where: Located, index: Index, rank: int, world_size: int) -> LoadStatus:
    """Fill every object of ``checkpoint``. See Checkpoint.restore for the promise and the errors."""
    objects = checkpoint.objects
    paths = {key: decode_path(path, where.path) for key, path in zip(index.names, index.paths, strict=True)}
    modules = {name: obj for name, obj in objects.items() if isinstance(obj, torch.nn.Module)}
    filling = _Filling(where, index, rank, world_size, modules, paths)
    for name, obj in objects.items():
        _prepare(filling, checkpoint, name, obj)
    _prepare_counter(filling, checkpoint)
    if filling.misshaped:
        raise MismatchError(where.path, (), (), filling.misshaped)
    with torch.no_grad():
        read_tensors(where, index, filling.tensors)
        values = read_values(where, index, sorted(filling.values))
        for step in filling.finish:
            step(values)
    unexpected = [key for key in paths if key not in filling.known and not _of_other_rank(paths[key], rank)]
    return LoadStatus(where.path, filling.missing, unexpected, len(filling.known - {SAVE_COUNTER}))


def _of_other_rank(path: Path, rank: int) -> bool:
    return len(path) > 1 and isinstance(path[1], RankStep) and path[1].rank != rank


def _prepare_counter(filling: _Filling, checkpoint: NamedObjects) -> None:
    if SAVE_COUNTER not in filling.saved:
        return
    filling.values.add(SAVE_COUNTER)
    filling.known.add(SAVE_COUNTER)
    filling.finish.append(lambda values: setattr(checkpoint, SAVE_COUNTER, int(values[SAVE_COUNTER])))


def _prepare(filling: _Filling, checkpoint: NamedObjects, name: str, obj: Any) -> None:
    prefix: Path = (DictStep(name),)
    if isinstance(obj, PerRank):
        _prepare_per_rank(filling, checkpoint, name, obj)
        return
    replaced = _prepare_object(filling, prefix, obj)
    if replaced is not None:
        filling.finish.append(lambda values: checkpoint.replace(name, replaced(values)))


def _prepare_object(filling: _Filling, prefix: Path, obj: Any) -> Callable[[Mapping[str, Any]], Any] | None:
    """Arrange for ``obj`` to be filled. Returns how to make its replacement, for what cannot be changed in place."""
    if isinstance(obj, torch.nn.Module):
        _prepare_module(filling, prefix, obj)
        return None
    if isinstance(obj, torch.optim.Optimizer):
        _prepare_optimizer(filling, prefix, obj)
        return None
    if is_stateful(obj):
        _prepare_stateful(filling, prefix, obj)
        return None
    return _prepare_tree(filling, prefix, obj)


def _prepare_module(filling: _Filling, prefix: Path, module: torch.nn.Module) -> None:
    extra: dict[str, str] = {}
    for leaf in flatten(model_tree(module), is_array, prefix):
        if is_array(leaf.value):
            _want_tensor(filling, leaf.key, leaf.value)
        elif _want_value(filling, leaf.key):
            extra[leaf.key] = _item(leaf.path[-1])
    if extra:
        options = StateDictOptions(strict=False)

        def set_extra(values: Mapping[str, Any]) -> None:
            set_model_state_dict(module, {name: values[key] for key, name in extra.items()}, options=options)

        filling.finish.append(set_extra)


def _prepare_optimizer(filling: _Filling, prefix: Path, optimizer: torch.optim.Optimizer) -> None:
    groups_path = (*prefix, DictStep("param_groups"))
    _prepare_groups(filling, groups_path, optimizer)
    state_path = (*prefix, DictStep("state"))
    saved = _below(filling, state_path)
    if list(saved) == [key_of(state_path)]:
        # It had not stepped when it was saved.
        filling.known.update(saved)
        filling.finish.append(lambda _: optimizer.state.clear())
        return
    tree = _initialized(optimizer, filling.modules)
    for leaf in flatten(tree["state"], is_array, state_path):
        if is_array(leaf.value):
            _want_tensor(filling, leaf.key, leaf.value)
        elif leaf.value != {}:
            _want_state_value(filling, leaf.key, leaf.path[len(prefix) + 1 :], tree["state"])
        elif leaf.key in filling.saved:
            filling.known.add(leaf.key)


def _prepare_groups(filling: _Filling, groups_path: Path, optimizer: torch.optim.Optimizer) -> None:
    saved = _below(filling, groups_path)
    if not saved:
        filling.missing.append(key_of(groups_path))
        return
    make = _rebuild(filling, groups_path, saved, {})
    filling.finish.append(lambda values: _set_groups(filling, optimizer, key_of(groups_path), make(values)))


def _initialized(optimizer: torch.optim.Optimizer, modules: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """The optimizer's tree with its state made, gradients of an unfinished step put aside meanwhile."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    aside = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        return optimizer_tree(optimizer, modules)
    finally:
        for parameter, grad in zip(parameters, aside, strict=True):
            parameter.grad = grad


def _want_state_value(filling: _Filling, key: str, inside: Path, state: dict[str, Any]) -> None:
    """Arrange for one plain value of the state, which is made of the optimizer's own inner dicts."""
    if not _want_value(filling, key):
        return
    holder = state
    for step in inside[:-1]:
        holder = holder[_item(step)]
    last = _item(inside[-1])
    filling.finish.append(lambda values: holder.__setitem__(last, values[key]))


def _item(step: Step) -> Any:
    return step.key if isinstance(step, KeyStep) else str(step)


def _set_groups(
    filling: _Filling, optimizer: torch.optim.Optimizer, key: str, saved: Sequence[Mapping[str, Any]]
) -> None:
    if len(saved) != len(optimizer.param_groups):
        text = f"{len(saved)} parameter groups saved, {len(optimizer.param_groups)} in the optimizer"
        raise MismatchError(filling.where.path, (), (), {key: text})
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for name, value in values.items():
            if isinstance(group.get(name), torch.Tensor) and isinstance(value, torch.Tensor):
                group[name].copy_(value)
            else:
                group[name] = value


def _prepare_stateful(filling: _Filling, prefix: Path, obj: Any) -> None:
    saved = _below(filling, prefix)
    current = {leaf.key: leaf.value for leaf in flatten(obj.state_dict(), is_array, prefix)}
    if not saved:
        filling.missing.extend(current or [key_of(prefix)])
        return
    make = _rebuild(filling, prefix, saved, current)
    filling.finish.append(lambda values: obj.load_state_dict(make(values)))


def _prepare_tree(filling: _Filling, prefix: Path, tree: Any) -> Callable[[Mapping[str, Any]], Any] | None:
    current = {leaf.key: leaf.value for leaf in flatten(tree, is_array, prefix)}
    saved = _below(filling, prefix)
    filling.missing.extend(key for key in current if key not in saved)
    if not saved:
        return None
    in_place = set()
    for key, value in current.items():
        if key in saved and is_array(value):
            _want_tensor(filling, key, value)
            in_place.add(key)
    rest = [key for key in saved if key not in in_place]
    others = _rebuild_leaves(filling, rest, {})

    def replacement(values: Mapping[str, Any]) -> Any:
        leaves = {**{key: current[key] for key in in_place}, **others(values)}
        fresh = _tree(filling, [(filling.saved[key][len(prefix) :], leaves[key]) for key in saved])
        return _merged(tree, fresh)

    return replacement


def _merged(old: Any, new: Any) -> Any:
    """``new``, poured into the mutable containers of ``old`` so that whoever holds those sees it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            old[key] = _merged(old.get(key), value)
        return old
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [_merged(old[at] if at < len(old) else None, value) for at, value in enumerate(new)]
        return old
    return new


def _prepare_per_rank(filling: _Filling, checkpoint: NamedObjects, name: str, wrapper: PerRank) -> None:
    prefix: Path = (DictStep(name),)
    saved = _below(filling, prefix)
    ranks = sorted({path[1].rank for path in saved.values() if isinstance(path[1], RankStep)})
    filling.known.update(saved)
    if not saved:
        filling.missing.append(key_of(prefix))
        return
    saved_world = filling.where.manifest.world_size
    if saved_world == filling.world_size:
        inner = _prepare_object(filling, (*prefix, RankStep(filling.rank)), wrapper.obj)
        if inner is not None:
            filling.finish.append(lambda values: setattr(wrapper, "obj", inner(values)))
    elif wrapper.on_resize == "error":
        raise ResizeError(name, saved_world, filling.world_size)
    elif callable(wrapper.on_resize):
        _prepare_resize(filling, name, wrapper, ranks)


def _prepare_resize(filling: _Filling, name: str, wrapper: PerRank, ranks: Sequence[int]) -> None:
    decide = cast("Callable[[list[Any], int, int], Any]", wrapper.on_resize)
    makers = []
    for rank in ranks:
        prefix: Path = (DictStep(name), RankStep(rank))
        makers.append(_rebuild(filling, prefix, _below(filling, prefix), {}))

    def finish(values: Mapping[str, Any]) -> None:
        value = decide([make(values) for make in makers], filling.rank, filling.world_size)
        if is_stateful(wrapper.obj):
            wrapper.obj.load_state_dict(value)
        else:
            wrapper.obj = _merged(wrapper.obj, value)

    filling.finish.append(finish)


def _below(filling: _Filling, prefix: Path) -> dict[str, Path]:
    depth = len(prefix)
    return {key: path for key, path in filling.saved.items() if path[:depth] == prefix}


def _rebuild(
    filling: _Filling, prefix: Path, saved: Mapping[str, Path], current: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], Any]:
    """Read everything below ``prefix`` into new memory and put the tree together again."""
    leaves = _rebuild_leaves(filling, list(saved), current)

    def make(values: Mapping[str, Any]) -> Any:
        found = leaves(values)
        return _tree(filling, [(saved[key][len(prefix) :], found[key]) for key in saved])

    return make


def _tree(filling: _Filling, leaves: list[tuple[Path, Any]]) -> Any:
    try:
        return unflatten(leaves)
    except ValueError as error:
        raise DamagedError(filling.where.path, f"the paths of its keys make no tree: {error}") from error


def _rebuild_leaves(
    filling: _Filling, keys: Sequence[str], current: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Leaves read into new memory, laid out as those of ``current`` where it has a tensor of that key and shape."""
    made: dict[str, torch.Tensor] = {}
    values: list[str] = []
    for key in keys:
        dtype, shape = filling.index.layout(key)
        filling.known.add(key)
        if dtype == "json":
            filling.values.add(key)
            values.append(key)
            continue
        made[key] = _like(current.get(key), shape, dtype)
        filling.tensors.setdefault(key, []).append(made[key])

    def found(read: Mapping[str, Any]) -> dict[str, Any]:
        tensors = {key: _as_before(current.get(key), tensor) for key, tensor in made.items()}
        return {**tensors, **{key: read[key] for key in values}}

    return found


def _like(current: Any, shape: Sequence[int], dtype: str) -> torch.Tensor:
    if isinstance(current, torch.Tensor) and global_shape(current) == tuple(shape):
        return torch.empty_like(current, dtype=dtype_from_name(dtype))
    return torch.empty(tuple(shape), dtype=dtype_from_name(dtype))


def _as_before(current: Any, tensor: torch.Tensor) -> Any:
    return tensor.numpy() if isinstance(current, np.ndarray) else tensor


def _want_tensor(filling: _Filling, key: str, array: torch.Tensor | np.ndarray[Any, Any]) -> None:
    if key not in filling.saved:
        filling.missing.append(key)
        return
    filling.known.add(key)
    dtype, shape = filling.index.layout(key)
    tensor = array if isinstance(array, torch.Tensor) else _writable(array, key)
    if dtype == "json" or shape != global_shape(tensor):
        saved = "a plain value" if dtype == "json" else f"{list(shape)}"
        filling.misshaped[key] = f"saved {saved}, here {list(global_shape(tensor))}"
        return
    filling.tensors.setdefault(key, []).append(tensor)


def _writable(array: np.ndarray[Any, Any], key: str) -> torch.Tensor:
    if not array.flags.writeable:
        raise MismatchError("", (), (), {key: "the NumPy array is read-only and cannot be filled in place"})
    return torch.from_numpy(array)


def _want_value(filling: _Filling, key: str) -> bool:
    if key not in filling.saved:
        filling.missing.append(key)
        return False
    filling.known.add(key)
    if filling.index.layout(key)[0] != "json":
        filling.misshaped[key] = "saved a tensor, here a plain value"
        return False
    filling.values.add(key)
    return True
