"""The oracle: a run that never stopped, one that torch restored, one that distckpt restored, and their differences."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
    return round_trip_together([entry], directory, number, within, **options)


def round_trip_together(
    entries: Sequence[Entry],
    directory: str,
    number: int = 1,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    **options: Any,
) -> list[str]:
    """As ``round_trip``, of all of them in one checkpoint."""
    trips = [_Trip(entry) for entry in entries]
    seeds = random_states()
    checkpoint = _together([trip.source for trip in trips])
    with distckpt.CheckpointManager(checkpoint, directory, **options) as manager:
        with within():
            pending = manager.save(number)
        assert pending is not None
        path = pending.result(SAVE_SECONDS)
    of_all = Verdict()
    of_all.compare("random numbers after the save", seeds, random_states())
    of_all.compare("keys", {}, wrapped_keys(path))
    for trip in trips:
        trip.was_saved()
    with ExitStack() as stack:
        for trip in trips:
            stack.enter_context(Untouched(trip.twin, trip.verdict))
        together = _together([trip.twin for trip in trips])
        manager = distckpt.CheckpointManager(together, directory, **options)
        with manager, within():
            manager.restore(number)
        _hand_out(together, [trip.twin for trip in trips])
    for trip in trips:
        if trip.was_restored():
            trip.go_on()
    found = [f"{trip.entry.name}: {line}" if len(trips) > 1 else line for trip in trips for line in trip.verdict.found]
    return [*of_all.found, *found]


def _together(runs: Sequence[Run]) -> distckpt.Checkpoint:
    if len(runs) == 1:
        return runs[0].checkpoint
    return distckpt.Checkpoint(
        **{f"of_{at}_{name}": each for at, run in enumerate(runs) for name, each in run.objects.items()}
    )


def _hand_out(checkpoint: distckpt.Checkpoint, runs: Sequence[Run]) -> None:
    """To each run what the checkpoint of all has now: another object, where it was a value or a tensor by itself."""
    if len(runs) > 1:
        for at, run in enumerate(runs):
            for name in run.objects:
                setattr(run.checkpoint, name, checkpoint.objects[f"of_{at}_{name}"])


class _Trip:
    """The way of one entry: trained, and torch's twin restored, when it is made."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.verdict = Verdict()
        self.source = entry.start(seed=0)
        take_steps(self.source, 0, entry.steps)
        self._before = observe(self.source)
        self._by_torch: Run | None = None
        if entry.oracle is not None:
            self._by_torch = entry.start_twin(seed=1)
            with Untouched(self._by_torch, Verdict()):
                entry.oracle(self.source, self._by_torch)

    def was_saved(self) -> None:
        """The save has changed nothing; the twin is made, and another."""
        self._saved = observe(self.source)
        self.verdict.compare("the saved run after the save", self._before, self._saved)
        self.twin = self.entry.start_twin(seed=1)
        assert differences(self._saved, observe(self.twin)), "the twin is equal by accident"

    def was_restored(self) -> bool:
        """Whether it is as torch restores it, and as it was saved."""
        twin = observe(self.twin)
        if self._by_torch is not None:
            self.verdict.compare("restored, against torch's restore", observe(self._by_torch), twin)
        if self.entry.exact:
            if self._by_torch is not None:
                oracle = differences(self._saved, observe(self._by_torch))
                assert not oracle, f"the oracle itself: {oracle[:5]}"
            self.verdict.compare("restored, against the saved run", self._saved, twin)
        return not self.verdict.found

    def go_on(self) -> None:
        """So it is after some more steps."""
        ends = {}
        for name, run in (("saved", self.source), ("twin", self.twin), ("torch", self._by_torch)):
            if run is not None:
                facts: Facts = {}
                describe("losses", take_steps(run, self.entry.steps, GO_ON), facts)
                ends[name] = {**facts, **observe(run)}
        if self._by_torch is not None:
            if self.entry.exact:
                oracle = differences(ends["saved"], ends["torch"])
                assert not oracle, f"the oracle itself: {oracle[:5]}"
            self.verdict.compare("gone on, against torch's restore", ends["torch"], ends["twin"])
        if self.entry.exact:
            self.verdict.compare("gone on, against the run that never stopped", ends["saved"], ends["twin"])


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
