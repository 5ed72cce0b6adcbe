"""The oracle: a run that never stopped, one that torch restored, one that distckpt restored, and their differences."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import distckpt
from tests.state.zoo.entry import Entry, Run, take_steps
from tests.state.zoo.observe import Facts, describe, differences, observe, text_of

GO_ON = 3
"""Steps after the restore."""

SAVE_SECONDS = 30


@dataclass(slots=True)
class Verdict:
    """What differed, by what was compared; nothing if the entry came back whole."""

    found: list[str] = field(default_factory=list)

    def compare(self, what: str, one: Facts, other: Facts) -> None:
        """Note every difference under the name of the comparison."""
        lines = differences(one, other)
        self.found += [f"{what}: {line}" for line in lines[:6]]
        if len(lines) > 6:
            self.found.append(f"{what}: and {len(lines) - 6} more")


def round_trip(
    entry: Entry,
    directory: str,
    number: int = 1,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    **options: Any,
) -> list[str]:
    """Train, save, restore into a twin, go on; every difference from the run that never stopped and from torch's way.

    The save and the restore happen ``within`` a context; managers get the options. Raises what distckpt raises.
    """
    verdict = Verdict()
    source = entry.start(seed=0)
    take_steps(source, 0, entry.steps)
    before = observe(source)
    by_torch = None
    if entry.oracle is not None:
        by_torch = entry.start_twin(seed=1)
        with Untouched(by_torch, Verdict()):
            entry.oracle(source, by_torch)
    seeds = random_states()
    with distckpt.CheckpointManager(source.checkpoint, directory, **options) as manager:
        with within():
            pending = manager.save(number)
        assert pending is not None
        path = pending.result(SAVE_SECONDS)
    verdict.compare("random numbers after the save", seeds, random_states())
    verdict.compare("the saved run after the save", before, observe(source))
    verdict.compare("keys", {}, wrapped_keys(path))
    saved = observe(source)
    twin = entry.start_twin(seed=1)
    assert differences(saved, observe(twin)), "the twin is equal by accident"
    manager = distckpt.CheckpointManager(twin.checkpoint, directory, **options)
    with Untouched(twin, verdict), manager, within():
        manager.restore(number)
    if by_torch is not None:
        verdict.compare("restored, against torch's restore", observe(by_torch), observe(twin))
    if entry.exact:
        if by_torch is not None:
            oracle = differences(saved, observe(by_torch))
            assert not oracle, f"the oracle itself: {oracle[:5]}"
        verdict.compare("restored, against the saved run", saved, observe(twin))
    if verdict.found:
        return verdict.found
    _go_on(entry, verdict, source, twin, by_torch)
    return verdict.found


def _go_on(entry: Entry, verdict: Verdict, source: Run, twin: Run, by_torch: Run | None) -> None:
    ends = {}
    for name, run in (("saved", source), ("twin", twin), ("torch", by_torch)):
        if run is not None:
            facts: Facts = {}
            describe("losses", take_steps(run, entry.steps, GO_ON), facts)
            ends[name] = {**facts, **observe(run)}
    if by_torch is not None:
        if entry.exact:
            oracle = differences(ends["saved"], ends["torch"])
            assert not oracle, f"the oracle itself: {oracle[:5]}"
        verdict.compare("gone on, against torch's restore", ends["torch"], ends["twin"])
    if entry.exact:
        verdict.compare("gone on, against the run that never stopped", ends["saved"], ends["twin"])


def wrapped_keys(path: str) -> Facts:
    """Keys on storage that say how the program happened to wrap its modules."""
    with distckpt.open(path) as reader:
        bad = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
        return {key: "a wrapper's name in a key" for key in reader.keys() if set(bad) & set(key.split("."))}  # noqa: SIM118


def random_states() -> Facts:
    """Where the global random number generators are."""
    facts: Facts = {}
    describe("torch", torch.get_rng_state(), facts)
    describe(
        "numpy", repr([getattr(part, "tolist", lambda part=part: part)() for part in np.random.get_state()]), facts
    )
    describe("python", repr(random.getstate()), facts)
    return facts


class Untouched:
    """Gives gradients and odd training modes to the modules of a run, and sees that what is done inside keeps them."""

    def __init__(self, run: Run, verdict: Verdict) -> None:
        self._verdict = verdict
        self._modules = list(_modules(run))
        self._parameters = list(_parameters(run))

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._modules]
        for at, module in enumerate(self._modules):
            module.training = at % 2 == 0
        for at, parameter in enumerate(self._parameters):
            if at % 2 == 0 and _takes_gradient(parameter):
                parameter.grad = torch.full_like(parameter, 0.5 + at)
        self._before = self._seen()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._verdict.compare("what a restore must leave alone", self._before, self._seen())
        for module, mode in self._modes:
            module.training = mode
        for parameter in self._parameters:
            parameter.grad = None

    def _seen(self) -> Facts:
        facts = random_states()
        for at, module in enumerate(self._modules):
            facts[f"mode of module {at}"] = str(module.training)
        for at, parameter in enumerate(self._parameters):
            grad = None if is_lazy(parameter) else parameter.grad
            facts[f"gradient {at}"] = "none" if grad is None else f"{id(grad)} {text_of(grad)}"
        return facts


def _modules(run: Run) -> Iterable[nn.Module]:
    for value in run.checkpoint.objects.values():
        inner = value.obj if isinstance(value, distckpt.PerRank) else value
        if isinstance(inner, nn.Module):
            yield from inner.modules()


def _parameters(run: Run) -> Iterable[torch.Tensor]:
    seen = set()
    for value in run.checkpoint.objects.values():
        inner = value.obj if isinstance(value, distckpt.PerRank) else value
        found: list[torch.Tensor] = []
        if isinstance(inner, nn.Module):
            found += inner.parameters()
        elif isinstance(inner, torch.optim.Optimizer):
            found += [parameter for group in inner.param_groups for parameter in group["params"]]
        for parameter in found:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _takes_gradient(parameter: torch.Tensor) -> bool:
    plain = type(parameter) in (nn.Parameter, torch.Tensor)
    return plain and not is_lazy(parameter) and parameter.requires_grad and parameter.device.type != "meta"
