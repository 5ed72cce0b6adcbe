"""Modules inside of other things: compiled, parallel, recomputed, parametrized, lazy, on meta."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.modules import adam, sgd
from tests.state.zoo.oracle import copied
from tests.state.zoo.training import batch, trained_by

SECTION = "modules"

add = partial(register, SECTION)


# ---- wrappers ------------------------------------------------------------------------------------------------------


def _deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 3))


def _compiled(*at: str) -> nn.Module:
    model: nn.Module = _deep()
    for name in at:
        if name:
            holder, _, last = name.rpartition(".")
            parent = model.get_submodule(holder)
            setattr(parent, last, torch.compile(parent.get_submodule(last), backend="eager"))
    return torch.compile(model, backend="eager") if "" in at else model  # type: ignore[return-value]


def _bare(module: nn.Module) -> nn.Module:
    """The module without what it is wrapped in, at any depth: what torch's own state dicts need."""
    while hasattr(module, "_orig_mod") or isinstance(module, nn.DataParallel):
        module = module.module if isinstance(module, nn.DataParallel) else module._orig_mod
    return module


def _plain_state(module: nn.Module) -> dict[str, Any]:
    parts = ("_orig_mod", "_checkpoint_wrapped_module", "module")
    return {".".join(p for p in key.split(".") if p not in parts): value for key, value in module.state_dict().items()}


def _by_plain_names(source: Run, twin: Run) -> None:
    """What torch does once the wrappers' names are taken out of the keys; optimizers go by number."""
    saved = _plain_state(source.objects["model"])
    model = twin.objects["model"]
    names = dict(zip(_plain_state(model), model.state_dict(), strict=True))
    model.load_state_dict({names[key]: copied(value) for key, value in saved.items()})
    twin.objects["optimizer"].load_state_dict(copied(source.objects["optimizer"].state_dict()))


def _data_parallel() -> nn.Module:
    return nn.DataParallel(_deep())


def _data_parallel_inside() -> nn.Module:
    model = _deep()
    model[1] = nn.DataParallel(model[1])
    return model


def _recomputed(*at: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _deep()
        for name in at:
            if name:
                holder, _, last = name.rpartition(".")
                parent = model.get_submodule(holder)
                setattr(parent, last, checkpoint_wrapper(parent.get_submodule(last)))
        return checkpoint_wrapper(model) if "" in at else model

    return make


def _recomputed_then_compiled() -> nn.Module:
    return torch.compile(_recomputed("0", "1")(), backend="eager")  # type: ignore[return-value]


def _compiled_then_recomputed() -> nn.Module:
    return checkpoint_wrapper(_compiled("1"))


def _wrapped_all() -> nn.Module:
    return torch.compile(nn.DataParallel(_recomputed("1.1", "1")()), backend="eager")  # type: ignore[return-value]


WRAPPED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "compile": ("`torch.compile` at any depth", lambda: _compiled("")),
    "compile-inside": ("`torch.compile` at any depth", lambda: _compiled("1", "2")),
    "compile-both": ("`torch.compile` at any depth", lambda: _compiled("1.1", "1", "")),
    "data-parallel": ("`DataParallel` anywhere", _data_parallel),
    "data-parallel-inside": ("`DataParallel` anywhere", _data_parallel_inside),
    "recompute": ("activation-checkpoint wrappers", _recomputed("")),
    "recompute-inside": ("activation-checkpoint wrappers", _recomputed("0", "1.1", "1")),
    "recompute-compiled": ("several wrappers in any order", _recomputed_then_compiled),
    "compile-recomputed": ("several wrappers in any order", _compiled_then_recomputed),
    "wrapped-all": ("several wrappers in any order", _wrapped_all),
}
for _name, (_kind, _make) in WRAPPED.items():
    add(_name, _kind, trained_by(adam, _make), steps=2, two_ranks=_name in ("compile", "recompute-inside"))
for _name in ("compile", "compile-inside", "data-parallel", "data-parallel-inside", "recompute-inside", "wrapped-all"):
    _kind, _make = WRAPPED[_name]
    for _suffix, _one, _other in (("into-bare", _make, _deep), ("from-bare", _deep, _make)):
        add(
            f"{_name}-{_suffix}",
            _kind,
            trained_by(adam, _one),
            twin=trained_by(adam, _other),
            oracle=_by_plain_names,
            exact=False,
            steps=2,
        )


def _compiled_method() -> nn.Module:
    model = _deep()
    model.compile(backend="eager")
    return model


class NamedModule(nn.Module):
    """Has a child that is really named ``module``, as wrappers of people's own have."""

    def __init__(self) -> None:
        super().__init__()
        self.module = _deep()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class OddNames(nn.Module):
    """Children with names that objects have too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(6, 6), "0": nn.Linear(6, 6), "a b/c": nn.Linear(6, 6)})
        self.weights = nn.ParameterDict({"état": nn.Parameter(torch.rand(6)), "step": nn.Parameter(torch.rand(6))})
        self.rest = nn.ParameterList([nn.Parameter(torch.rand(6)) for _ in range(11)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            x = torch.tanh(part(x))
        return x * sum(self.weights.values()) * sum(self.rest)  # type: ignore[arg-type]


add("compile-method", "`torch.compile` at any depth", trained_by(adam, _compiled_method), steps=2)
add("child-named-module", "a child that is named `module`", trained_by(adam, NamedModule), two_ranks=True)
add("odd-names", "children with names of every kind", trained_by(adam, OddNames), two_ranks=True)


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(_deep(), batch(0))


add("traced", "traced modules", trained_by(adam, _scripted))


# ---- parametrizations ----------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    """A parametrization with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.triu() + x.triu(1).transpose(-1, -2)) * self.gain


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 2))


def _orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 2))


def _old(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(norm(nn.Linear(6, 5)), nn.Linear(5, 2))

    return make


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = _deep()
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    return model


_PARAMETRIZED = "parametrizations, weight norm, spectral norm, pruning"
add("parametrized", _PARAMETRIZED, trained_by(adam, _parametrized), two_ranks=True)
add("weight-norm", _PARAMETRIZED, trained_by(adam, _weight_norm))
add("spectral-norm", _PARAMETRIZED, trained_by(adam, _spectral_norm))
add("orthogonal", _PARAMETRIZED, trained_by(adam, _orthogonal))
add("weight-norm-old", _PARAMETRIZED, trained_by(sgd, _old(nn.utils.weight_norm)))
add("spectral-norm-old", _PARAMETRIZED, trained_by(sgd, _old(nn.utils.spectral_norm)))
add("pruned", _PARAMETRIZED, trained_by(adam, _pruned))


# ---- lazy, meta, default device ----------------------------------------------------------------------------------------


def _lazy(used: bool) -> Callable[[], Run]:
    def build() -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))
        if used:
            with torch.no_grad():
                model(batch(0))
        return Run({"model": model}, lambda at: model(batch(at)).mean().detach())

    return build


add("lazy-used", "lazy modules that have seen an input", _lazy(True))
add("lazy-into", "lazy modules that are restored before they have seen an input", _lazy(True), twin=_lazy(False))
add(
    "lazy-unused",
    "lazy modules that have seen no input",
    _lazy(False),
    steps=0,
    refused=Refusal("model.0.", r"(?i)input|forward|initiali|materiali|dry run"),
)


def _meta() -> Run:
    with torch.device("meta"):
        model = _deep()
    return Run({"model": model})


def _partly_meta() -> Run:
    model = _deep()
    model[2] = nn.Linear(5, 3, device="meta")
    return Run({"model": model})


_META = r"(?i)to_empty|materiali|load|device|initiali"
add("meta", "modules on the meta device", _meta, steps=0, refused=Refusal("model.0.weight", _META))
add("meta-partly", "modules on the meta device", _partly_meta, steps=0, refused=Refusal("model.2.weight", _META))


add(
    "no-parameters",
    "modules without parameters",
    lambda: Run({"model": nn.Tanh(), "step": 3, "own": {"a": torch.rand(2)}}),
)
