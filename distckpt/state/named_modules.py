"""The modules of a checkpoint, which name the parameters of its optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from distckpt.state.module_code import is_saved_by_torch
from distckpt.state.module_names import unwrapped


class NamedModules:
    """Modules by their names. Every question is answered as they are now; while they are ``at_rest``, from one look.

    There may be an optimizer for every parameter, and each asks. A look has FSDP2 put its shards back, as ``state_dict``
    has: after a forward pass without a backward one, modules may hold whole parameters that no optimizer knows.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._sharded: list[FSDPModule] | None = None
        self._rest: _Look | None = None

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nothing is renamed, added or removed meanwhile."""
        self._rest = self._look()
        try:
            yield
        finally:
            self._rest = None

    def names(self, parameters: Sequence[torch.Tensor]) -> dict[int, str]:
        """Names for those of the parameters that the modules hold, by ``id``.

        They are the names in the first module that holds all of those; else each begins with its module's name.
        """
        return (self._rest or self._look()).names(parameters)

    def are_saved_by_torch(self) -> bool:
        """Whether no code but torch's has a say in what any of them saves."""
        return (self._rest or self._look()).are_saved_by_torch()

    def _look(self) -> _Look:
        if self._sharded is None:
            parts = (part for module in self._modules.values() for part in module.modules())
            self._sharded = [part for part in parts if isinstance(part, FSDPModule)]
        for part in self._sharded:
            part.reshard()
        return _Look(self._modules)


class _Look:
    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._found: dict[int, dict[str, str]] | None = None
        self._parameters: list[torch.Tensor] = []
        self._by_torch: bool | None = None

    def names(self, parameters: Sequence[torch.Tensor]) -> dict[int, str]:
        known = self._known()
        held = {key: known[key] for key in map(id, parameters) if key in known}
        for title in next(iter(held.values()), {}):
            if all(title in names for names in held.values()):
                return {key: names[title] for key, names in held.items()}
        return {key: ".".join(next(iter(names.items()))) for key, names in held.items()}

    def are_saved_by_torch(self) -> bool:
        if self._by_torch is None:
            self._by_torch = all(map(is_saved_by_torch, self._modules.values()))
        return self._by_torch

    def _known(self) -> dict[int, dict[str, str]]:
        """Of each parameter, by ``id``, its name in each module that holds it. They live for as long as this does."""
        if self._found is None:
            self._found = {}
            for title, module in self._modules.items():
                for name, parameter in module.named_parameters():
                    self._found.setdefault(id(parameter), {})[title] = unwrapped(module, name)
                    self._parameters.append(parameter)
        return self._found
