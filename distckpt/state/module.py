"""Modules: what ``state_dict`` gives, by names free of wrappers; taken back in place, or by ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from distckpt.errors import EncodeError, MismatchError
from distckpt.format.tree.tree import DictStep, Path, key_of
from distckpt.state.kind import Section, Sign
from distckpt.state.match import Like, Make, Match, Saved
from distckpt.state.memory import PLAIN, is_same_memory, overlaps, storage_of
from distckpt.state.module_code import is_of_torch, is_saved_by_torch
from distckpt.state.module_names import unwrapped, wrapped
from distckpt.state.objects import is_array


class ModuleState:
    """A module. Its tensors are filled where they are, unless its own code has a say in what is loaded.

    That code is ``set_extra_state``, hooks of ``load_state_dict``, and methods of the module that stand in for torch's.
    What belongs to a submodule with such code is read into new memory and handed to ``load_state_dict``.
    """

    def __init__(self, module: torch.nn.Module, prefix: Path) -> None:
        self._module = module
        self._prefix = prefix

    def sections(self) -> list[Section]:
        """One; of its buffers the lowest rank's count, since each rank of DDP keeps its own and rank 0's are the truth."""
        module = self._module
        for name, part in module.named_modules():
            if type(part).__name__ == "FullyShardedDataParallel":
                raise EncodeError(
                    key_of((*self._prefix, DictStep(name))) if name else key_of(self._prefix),
                    "FullyShardedDataParallel (FSDP1) flattens parameters, and its shards cannot be told apart. "
                    "Use fully_shard (FSDP2), which needs no other change",
                )
        return [
            Section(
                self._prefix,
                lambda: _checked(module, state_of(module), self._prefix),
                (lambda: _signs(module)) if is_saved_by_torch(module) else None,
                lambda: (unwrapped(module, name) for name, _ in module.named_buffers(remove_duplicate=False)),
            )
        ]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, under all its names."""
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            yield key_of((*self._prefix, DictStep(unwrapped(self._module, name)))), parameter

    def match(self, match: Match, saved: Saved) -> None:
        """Every name of the module must be there, with its shape. Extra names are for code of the module's to take."""
        live = state_of(self._module)
        match.claim(key for key in saved if not saved.inside(key))  # an empty one
        coded = _Coded(self._module, live)
        parts = {str(step): part for step, part in saved.by_step().items()}
        by_key = {key_of((*self._prefix, DictStep(name))): value for name, value in live.items()}
        lacking = [name for name in live if name not in parts and not coded.knows(name)]
        match.lacks(key_of((*self._prefix, DictStep(name))) for name in _without_tied(lacking, live, parts))
        makers: dict[str, Make] = {}
        in_place: dict[str, Any] = {}
        for name, part in parts.items():
            value, key = live.get(name), key_of(part.prefix)
            if value is not None and coded.knows(name) and coded.keeps_shape(name) and not _fits(part, key, value):
                match.misfit(key, f"saved {list(part.layout(key)[1])}, here {list(value.shape)}")
            elif key in part and is_array(value) and not coded.knows(name) and name in coded.held:
                if match.fill(part, key, value):
                    in_place[name] = value
            elif name in live or coded.knows(name):
                makers[name] = match.tree(part, {}, _like(by_key))
        if makers:
            match.afterwards(
                lambda values: self._load(match, {name: make(values) for name, make in makers.items()}, in_place)
            )

    def put(self, tree: Any) -> None:
        """Load all of it. RuntimeError, as torch raises it, for what does not fit."""
        self._module.load_state_dict({wrapped(self._module, name): value for name, value in tree.items()})

    def _load(self, match: Match, loaded: Mapping[str, Any], in_place: Mapping[str, Any]) -> None:
        # What is in its place already goes along: hooks see a whole state dict, and a copy onto itself changes nothing.
        named = {wrapped(self._module, name): value for name, value in {**in_place, **loaded}.items()}
        here = key_of(self._prefix)
        known = {key for key in (*match.missing, *match.misfits) if key.startswith(f"{here}.")}
        try:
            if not match.partial and not known and match.asks_all(here):
                self._module.load_state_dict(named)
                return
            found = self._module.load_state_dict(named, strict=False)
        except RuntimeError as error:
            raise MismatchError(match.stored.path, (), (), {here: str(error)}) from error
        missing, unexpected = (
            [key for name in names if (key := f"{here}.{unwrapped(self._module, name)}") not in known]
            for names in (found.missing_keys, found.unexpected_keys)
        )
        match.lacks(missing)
        match.disclaim(unexpected)
        if not match.partial and (unexpected or any(map(match.asks, missing))):
            raise MismatchError(match.stored.path, [key for key in missing if match.asks(key)], unexpected, {})


def _without_tied(names: Sequence[str], live: Mapping[str, Any], saved: Collection[str]) -> list[str]:
    """Those whose memory is not filled under another name: files of others have tied weights once."""
    tensors = [live[name] for name in saved if isinstance(live.get(name), torch.Tensor)] if names else []
    places: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        if not is_lazy(tensor) and not tensor.is_meta and tensor.numel():
            places.setdefault(storage_of(tensor), []).append(tensor)

    def is_filled(value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or is_lazy(value) or value.is_meta:
            return False
        return any(is_same_memory(value, other) for other in places.get(storage_of(value), ()))

    return [name for name in names if not is_filled(live[name])]


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    """The module's state by name, free of what wrappers add. EncodeError if two of its parts then have one name."""
    found: dict[str, Any] = {}
    for raw, value in module.state_dict().items():
        name = unwrapped(module, raw)
        if name in found:
            raise EncodeError(name, f"two entries of the module's state dict have this name without wrappers: {raw}")
        found[name] = value
    return found


def _checked(module: torch.nn.Module, state: dict[str, Any], prefix: Path) -> dict[str, Any]:
    """The state, if torch can load all of it. EncodeError for a tensor of the module's that cannot be filled."""
    wide = [name for name, value in state.items() if type(value) in PLAIN and not is_lazy(value) and overlaps(value)]
    coded = _Coded(module, state) if wide else None
    for name in wide:
        if coded is not None and name in coded.held and not coded.knows(name):
            raise EncodeError(
                key_of((*prefix, DictStep(name))),
                "some elements of the tensor share memory, as after expand(), and neither load_state_dict nor a restore "
                "could fill it: give it memory of its own, by clone(memory_format=torch.contiguous_format)",
            )
    return state


def _signs(module: torch.nn.Module) -> Iterator[Sign]:
    """All that torch's own ``state_dict`` goes by. One walk: this is done at every save."""
    for title, part in module.named_modules(remove_duplicate=False):
        yield title, part
        yield "", type(part)
        yield from part._parameters.items()
        unsaved = part._non_persistent_buffers_set
        yield from ((name, buffer) for name, buffer in part._buffers.items() if name not in unsaved)
        yield from part._state_dict_hooks.items()
        yield from part._state_dict_pre_hooks.items()
        yield from ((method, part.__dict__[method]) for method in _OWN if method in part.__dict__)


_OWN = ("state_dict", "_save_to_state_dict")
"""Methods of torch that a module may have put something else in place of, for itself alone."""


class _Coded:
    """Where code of the module's own has a say in what is loaded, and of which names that have none the memory is known.

    ``held`` are the names of the state dict whose tensor is a parameter or buffer of the module itself.
    """

    def __init__(self, module: torch.nn.Module, live: Mapping[str, Any]) -> None:
        parts = [
            (f"{unwrapped(module, name)}." if name else "", transforms) for name, transforms in _coded_parts(module)
        ]
        self._parts = tuple(begin for begin, _ in parts)
        self._transforming = tuple(begin for begin, transforms in parts if transforms)
        self.held = frozenset(_held_names(module, live))

    def knows(self, name: str) -> bool:
        """Whether such code may know what to do with ``name``."""
        return name.startswith(self._parts)

    def keeps_shape(self, name: str) -> bool:
        """Whether what goes by ``name`` must have the shape that it has here, as nothing comes before torch's loading."""
        return name in self.held and not name.startswith(self._transforming)


def _fits(saved: Saved, key: str, value: torch.Tensor) -> bool:
    """Whether torch loads it; a single number may come as a vector of one."""
    if key not in saved or saved.is_value(key) or is_lazy(value):
        return True
    shape = saved.layout(key)[1]
    return shape == tuple(value.shape) or (value.dim() == 0 and len(shape) == 1)


def _coded_parts(module: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    """The names of parts with code of their own, and whether it comes before torch's and may change what is loaded."""
    for name, part in module.named_modules():
        before = (
            *part._load_state_dict_pre_hooks.values(),
            *(getattr(part, method) for method in ("load_state_dict", "_load_from_state_dict")),
        )
        is_lazy_part = isinstance(part, LazyModuleMixin) and part.has_uninitialized_params()  # type: ignore[misc]  # torch annotates the mixin's self oddly
        if is_lazy_part or not all(map(is_of_torch, before)):
            yield name, True
        elif not all(map(is_of_torch, part._load_state_dict_post_hooks.values())):
            yield name, False


def _held_names(module: torch.nn.Module, live: Mapping[str, Any]) -> Iterator[str]:
    own = {
        unwrapped(module, name): tensor
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    for name, value in live.items():
        held = own.get(name)
        if held is not None and isinstance(value, torch.Tensor) and is_same_memory(held, value):
            yield name


def _like(by_key: Mapping[str, Any]) -> Like:
    def like(key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        value = by_key.get(key)
        return value if isinstance(value, torch.Tensor) and not is_lazy(value) else None

    return like
