"""Optimizers: what ``state_dict`` gives, keyed by parameter name; taken back by the optimizer's ``load_state_dict``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from distckpt.errors import EncodeError
from distckpt.format.tree.path import DictStep, KeyStep, Path, Step, TypedStep, key_of
from distckpt.format.tree.tree import Leaf, flatten
from distckpt.state.kind import Section, Sign
from distckpt.state.match import Make, Match, Saved, Values, nothing_like
from distckpt.state.memory import storage_of, writable
from distckpt.state.named_modules import NamedModules
from distckpt.state.objects import is_array

STATE, GROUPS = "state", "param_groups"
WHO = ("params", "param_names")
"""What a parameter group says of who is in it. That is the program's business, and differs between pipeline stages."""

Name = str | int
"""A parameter's name in the module that holds it; its number in the optimizer if none does."""


class OptimizerState:
    """An optimizer. ``modules`` are those that name its parameters; parameters of no module go by their number.

    ``state`` and ``param_groups`` are what torch's optimizers have; whatever else the optimizer's ``state_dict`` gives
    is saved beside them, and so are optimizers that it keeps inside without giving their state.
    """

    def __init__(self, optimizer: Optimizer, prefix: Path, modules: NamedModules) -> None:
        self._optimizer = optimizer
        self.prefix = prefix
        self._modules = modules

    def sections(self) -> list[Section]:
        """State and groups, each by itself: usually only the groups are read again at a save."""
        optimizer, prefix = self._optimizer, self.prefix
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise EncodeError(
                key_of(prefix),
                "ZeroRedundancyOptimizer gives its state only after all ranks have sent theirs to one. "
                "Shard the optimizer together with the model, by fully_shard (FSDP2)",
            )
        if _is_plain(optimizer):
            sections = [
                Section((*prefix, DictStep(STATE)), self._read_state, self._witness if self._is_seen() else None),
                Section((*prefix, DictStep(GROUPS)), self._read_groups),
            ]
        else:
            sections = [Section(prefix, self._read_own)]
        for inner in self._inner():
            sections += inner.sections()
        return sections

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Where the state of each parameter is, or would be."""
        for name, parameter in zip(self._names(), self._parameters(), strict=True):
            step = DictStep(name) if isinstance(name, str) else KeyStep(name)
            yield key_of((*self.prefix, DictStep(STATE), step)), parameter
        for inner in self._inner():
            yield from inner.parameters()

    def match(self, match: Match, saved: Saved) -> None:
        """Every group must be there. A parameter without saved state has none afterwards, and starts anew."""
        parts = saved.by_step()
        inner = self._inner()
        for kind in inner:
            kind.match(match, parts.pop(kind.prefix[-1], saved.nothing(kind.prefix[-1])))
        own = self._optimizer.state_dict() if not _is_plain(self._optimizer) else {STATE: {}, GROUPS: []}
        if parts and STATE in own and not match.asks_all(key_of((*self.prefix, DictStep(STATE)))):
            parts.setdefault(DictStep(STATE), saved.nothing(DictStep(STATE)))  # nothing of it was saved, and some stays
        match.lacks(key_of((*self.prefix, DictStep(name))) for name in own if DictStep(name) not in parts)
        parts = self._taken(match, parts, own)
        if not parts:
            return
        makers = {str(step): self._match_part(match, str(step), part) for step, part in parts.items()}
        groups = makers.get(GROUPS)
        if groups is not None:
            match.check(lambda values: self._check_groups(match, groups(values)))

        def put(values: Values) -> None:
            tree = {name: make(values) for name, make in makers.items()}
            if not match.asks_all(key_of(self.prefix)) or match.partial:
                tree = {**self._now(), **tree}
            if key_of((*self.prefix, DictStep(GROUPS))) in match.misfits:
                tree[GROUPS] = self._read_groups()
            stays = [] if match.asks_all(key_of(self.prefix)) else list(self._unasked(match))
            self._load(tree)
            for parameter, key, value in stays:  # as it is: torch has made it the parameter's dtype
                self._optimizer.state[parameter][key] = value

        match.afterwards(put)

    def _unasked(self, match: Match) -> Iterator[tuple[torch.Tensor, Any, torch.Tensor]]:
        """The tensors of the state that are not to be restored: whose, their key, and they themselves."""
        if _is_plain(self._optimizer):
            for name, parameter in zip(self._names(), self._parameters(), strict=True):
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    text = key_of((*self.prefix, DictStep(STATE), DictStep(str(name)), DictStep(str(key))))
                    if isinstance(value, torch.Tensor) and not match.asks(text) and text not in match.claimed:
                        yield parameter, key, value

    def by_name(self, paths: Mapping[str, Path]) -> dict[str, Path]:
        """Where state that was saved by numbers alone, as in torch's own ``state_dict``, belongs here: of each such key of
        ``paths`` the path under the name that the parameter in that place has. Nothing if it was saved by names."""
        names, before = self._names(), (*self.prefix, DictStep(STATE))
        depth = len(before)
        owners = {path[depth] for path in paths.values() if path[:depth] == before and len(path) > depth}
        numbers = {step.key for step in owners if isinstance(step, KeyStep) and _is_number(step.key, names)}
        if not owners or len(numbers) < len(owners) or not all(isinstance(names[number], str) for number in numbers):
            return {}
        moved = {}
        for key, path in paths.items():
            owner = path[depth] if path[:depth] == before and len(path) > depth else None
            if isinstance(owner, KeyStep):
                moved[key] = (*before, DictStep(str(names[owner.key])), *path[depth + 1 :])
        return moved

    def put(self, tree: Any) -> None:
        """Load all of it, state under the numbers that ``load_state_dict`` knows the parameters by."""
        inner = {str(kind.prefix[-1]): kind for kind in self._inner()}
        self._load({name: value for name, value in tree.items() if name not in inner})
        for name, kind in inner.items():
            if name in tree:
                kind.put(tree[name])

    def _load(self, tree: Mapping[str, Any]) -> None:
        loaded = dict(tree)
        numbers = {name: number for number, name in enumerate(self._names())}
        if STATE in loaded:
            loaded[STATE] = {numbers.get(name, name): entry for name, entry in loaded[STATE].items()}
        if GROUPS in loaded:
            counts = iter(range(len(numbers)))
            loaded[GROUPS] = [
                {**group, "params": [next(counts) for _ in mine["params"]]}
                for group, mine in zip(loaded[GROUPS], self._optimizer.param_groups, strict=True)
            ]
        self._optimizer.load_state_dict(loaded)

    # ---- what is read --------------------------------------------------------------------------------------------

    def _is_seen(self) -> bool:
        """Whether the witness sees all that decides what is read: nothing is inside of containers, whose items come and
        go, and the modules that name the parameters show by their own state when a name changes."""
        entries = self._optimizer.state.values()
        flat = all(isinstance(item, torch.Tensor) for entry in entries for item in getattr(entry, "values", tuple)())
        return flat and self._modules.are_saved_by_torch()

    def _witness(self) -> Iterator[Sign]:
        state, seen = self._optimizer.state, 0
        for parameter in self._parameters():
            yield "", parameter
            entry = state.get(parameter)
            if entry is not None:
                seen += 1
                yield from entry.items()
        if len(state) > seen:  # what was left behind by a parameter that is gone, or is none's
            yield from ((STATE, thing) for pair in state.items() for thing in pair)

    def _now(self) -> dict[str, Any]:
        if _is_plain(self._optimizer):
            return {STATE: self._read_state(), GROUPS: self._read_groups()}
        return self._read_own()

    def _read_own(self) -> dict[str, Any]:
        """What an optimizer with a word in it gives, under the names that the parameters have here."""
        own = dict(self._optimizer.state_dict())
        if STATE in own:
            own[STATE] = self._named(own[STATE])
        if GROUPS in own:
            own[GROUPS] = _without_who(own[GROUPS])
        return own

    def _named(self, numbered: Mapping[Any, Any]) -> dict[Any, Any]:
        names = self._names()
        return {names[key] if _is_number(key, names) else key: entry for key, entry in numbered.items()}

    def _read_state(self) -> dict[Any, Any]:
        optimizer, names = self._optimizer, self._names()
        known = {id(parameter): name for parameter, name in zip(self._parameters(), names, strict=True)}
        # What a parameter has left behind that is in no group any more is nobody's: torch cannot give it either.
        return {
            known.get(id(owner), owner): entry
            for owner, entry in optimizer.state.items()
            if id(owner) in known or not isinstance(owner, torch.Tensor)
        }

    def _read_groups(self) -> list[dict[str, Any]]:
        return _without_who(self._optimizer.param_groups)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _names(self) -> list[Name]:
        """A name for each parameter, in the order of ``state_dict``'s numbers."""
        parameters = self._parameters()
        named = self._modules.names(parameters)
        return [named.get(id(parameter), number) for number, parameter in enumerate(parameters)]

    def _inner(self) -> list[OptimizerState]:
        """Optimizers that this one keeps, and of whose state its own ``state_dict`` says nothing."""
        return [
            OptimizerState(inner, (*self.prefix, DictStep(name)), self._modules)
            for name, inner in _inner_of(self._optimizer)
        ]

    # ---- what is taken back --------------------------------------------------------------------------------------

    def _taken(self, match: Match, parts: dict[Step, Saved], own: Collection[str]) -> dict[Step, Saved]:
        """Those parts that loading takes, or that the optimizer gives itself. Torch's own loading would drop others: they
        are left, and told as unexpected."""
        if not _is_loaded_by_torch(self._optimizer):
            return parts
        taken = {step: part for step, part in parts.items() if str(step) in (STATE, GROUPS, *own)}
        if any(str(step).startswith((f"{STATE}.", f"{GROUPS}.")) for step in parts.keys() - taken.keys()):
            match.misfit(
                key_of(self.prefix),
                "it was saved flat, as by StateDictOptions(flatten_optimizer_state_dict=True): save it without that option, "
                "or load it by dcp.load with distckpt.dcp.Reader, into a state dict made with that option",
            )
        return taken

    def _match_part(self, match: Match, name: str, saved: Saved) -> Make:
        return self._match_state(match, saved) if name == STATE else match.tree(saved, {}, nothing_like)

    def _match_state(self, match: Match, saved: Saved) -> Make:
        """State of parameters that are here; what belongs to others is left, and told as unexpected."""
        parameters = dict(zip(self._names(), self._parameters(), strict=True))
        owners = {_name_of(step): step for step in (path[len(saved.prefix)] for path in _paths(saved))}
        saved_names = _names_of_parameters(saved)
        strangers = {step for name, step in owners.items() if name not in parameters and saved_names(name)}
        ours = saved.without(strangers)
        live = self._live(parameters, saved.prefix)

        def like(key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
            owner = parameters.get(_name_of(ours.paths[key][len(saved.prefix)]))
            return owner if owner is not None and shape else None

        kept: list[Leaf] = []
        if not match.asks_all(key_of(self.prefix)):
            kept = match.unasked(flatten(self._now()[STATE], is_array, saved.prefix), ours)
        inside = [(leaf.path[len(saved.prefix) :], leaf.value) for leaf in kept]
        make = match.tree(ours, _fitting(match, ours, live), like, inside)
        return lambda values: _as_owners_have_them(make(values), parameters)

    def _live(self, parameters: Mapping[Name, torch.Tensor], prefix: Path) -> dict[str, torch.Tensor]:
        """The tensors of the state that is there already: it is read into them, if their memory is theirs alone."""
        if not _is_plain(self._optimizer):
            return {}
        held = {name: self._optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
        leaves = flatten({name: entry for name, entry in held.items() if entry}, is_array, prefix)
        found = {leaf.key: leaf.value for leaf in leaves if isinstance(leaf.value, torch.Tensor)}
        others = [*parameters.values(), *(one.grad for one in parameters.values() if one.grad is not None)]
        uses = Counter(map(storage_of, (*found.values(), *others)))
        return {key: value for key, value in found.items() if uses[storage_of(value)] == 1}

    def _check_groups(self, match: Match, groups: Any) -> None:
        key, here = key_of((*self.prefix, DictStep(GROUPS))), len(self._optimizer.param_groups)
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            match.misfit(key, "what was saved is no list of parameter groups")
        elif len(groups) != here:
            match.misfit(key, f"{len(groups)} parameter groups saved, {here} in the optimizer")
        elif (told := _counts_of(groups)) and told != (counts := _counts_of(self._optimizer.param_groups)):
            match.misfit(key, f"parameter groups of {told} parameters saved, of {counts} in the optimizer")


def _counts_of(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many parameters are in each group; nothing if the groups do not say it."""
    told = [group.get("params") for group in groups]
    return [len(params) for params in told if isinstance(params, list)] if None not in told else []


def makeup_of(optimizer: Optimizer) -> tuple[Any, ...]:
    """What decides into which sections it is taken apart."""
    return _is_plain(optimizer), *(inner for _, inner in _inner_of(optimizer))


def _inner_of(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Those in attributes, or in lists, tuples and dicts that are attributes; each once."""
    if type(optimizer).state_dict is not Optimizer.state_dict:
        return
    seen = set[int]()
    for name, value in _attributes(optimizer):
        if isinstance(value, Optimizer) and value.state is not optimizer.state and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    for name, value in vars(optimizer).items():
        yield name, value
        if name not in (STATE, GROUPS):
            items = (
                value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
            )
            yield from ((f"{name}.{key}", item) for key, item in items if isinstance(item, Optimizer))


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether its state is what torch's own ``state_dict`` would make of ``state`` and ``param_groups``."""
    if type(optimizer).state_dict is not Optimizer.state_dict or "state_dict" in vars(optimizer):
        return False
    return not (optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks)


def _is_loaded_by_torch(optimizer: Optimizer) -> bool:
    """Whether nothing but torch's own ``load_state_dict`` sees what is loaded; hooks that come after it do not."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict or "load_state_dict" in vars(optimizer):
        return False
    return not optimizer._optimizer_load_state_dict_pre_hooks


def _without_who(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name not in WHO} for group in groups]


def _is_number(owner: Any, names: Sequence[Name]) -> bool:
    return type(owner) is int and 0 <= owner < len(names)


def _name_of(step: Step) -> Any:
    inside = step.step if isinstance(step, TypedStep) else step
    return inside.key if isinstance(inside, KeyStep) else str(inside)


def _names_of_parameters(saved: Saved) -> Callable[[Any], bool]:
    """Tells the names of parameters that were saved from what optimizers keep in their state beside them."""

    @cache  # most restores never ask
    def titles() -> set[str]:
        return {key.partition(".")[0] for key in saved.origins}

    def is_parameter(name: Any) -> bool:
        if type(name) is not str:
            return type(name) is int
        return name in saved.origins or any(f"{title}.{name}" in saved.origins for title in titles())

    return is_parameter


def _paths(saved: Saved) -> Iterable[Path]:
    return (path for path in saved.paths.values() if len(path) > len(saved.prefix))


def _fitting(match: Match, saved: Saved, live: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Those of the live tensors into which what was saved can be read as it is."""
    return {
        key: array
        for key, array in live.items()
        if key in saved
        and not saved.is_value(key)
        and not match.is_taken(array)
        and writable(array)
        and saved.layout(key) == (str(array.dtype).removeprefix("torch."), tuple(array.shape))
    }


def _as_owners_have_them(state: Any, parameters: Mapping[Name, torch.Tensor]) -> Any:
    """Plain tensors that belong to a DTensor become DTensors too, which every rank has whole: torch mixes no others."""
    for name, entry in (state or {}).items():
        owner = parameters.get(name)
        if isinstance(owner, DTensor) and isinstance(entry, dict):
            for key, value in entry.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.dim():
                    entry[key] = _replicated(value, owner)
    return state


def _replicated(value: torch.Tensor, owner: DTensor) -> DTensor:
    mesh = owner.device_mesh
    local = value.to(owner.to_local().device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
