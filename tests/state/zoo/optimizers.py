"""Every optimizer of torch.optim, and what programs do to optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from tests.state.zoo.entry import Run, register
from tests.state.zoo.training import batch, closure_stepper, small, stepper, trained_by

Step = Callable[[int], Any]

SECTION = "optimizers"

add = partial(register, SECTION)

PLAIN: dict[type[optim.Optimizer], list[tuple[str, dict[str, Any]]]] = {
    optim.SGD: [
        ("momentum", {"lr": 0.1, "momentum": 0.9}),
        ("nesterov", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ],
    optim.Adam: [("amsgrad", {"amsgrad": True}), ("betas", {"betas": (0.5, 0.7), "weight_decay": 0.1})],
    optim.AdamW: [("amsgrad", {"amsgrad": True})],
    optim.Adagrad: [("accumulator", {"lr": 0.1, "initial_accumulator_value": 0.2})],
    optim.Adadelta: [],
    optim.Adamax: [],
    optim.Adafactor: [],
    optim.ASGD: [("early", {"t0": 1.0})],
    optim.NAdam: [("decoupled", {"decoupled_weight_decay": True, "weight_decay": 0.1})],
    optim.RAdam: [("decoupled", {"decoupled_weight_decay": True, "weight_decay": 0.1})],
    optim.RMSprop: [("centered", {"centered": True, "momentum": 0.9})],
    optim.Rprop: [],
}


def _variants(kind: type[optim.Optimizer]) -> list[tuple[str, dict[str, Any]]]:
    known = inspect.signature(kind).parameters
    found: list[tuple[str, dict[str, Any]]] = [("", {})]
    found += [(name, {name: True}) for name in ("foreach", "fused", "maximize") if name in known]
    if "Tensor" in str(known["lr"].annotation):
        found.append(("tensor-lr", {"lr": torch.tensor(0.01), **({"foreach": False} if "foreach" in known else {})}))
    return found + PLAIN[kind]


def _fresh(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}


def _making(kind: type[optim.Optimizer], options: dict[str, Any]) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: kind(parameters, **_fresh(options))


for _kind in PLAIN:
    for _name, _options in _variants(_kind):
        add(
            f"{_kind.__name__.lower()}{'-' if _name else ''}{_name}",
            f"`torch.optim.{_kind.__name__}`",
            trained_by(_making(_kind, _options)),
            two_ranks=_name in ("", "tensor-lr", "momentum"),
        )


def _capturable(kind: type[optim.Optimizer]) -> Callable[[], Run]:
    """It runs on accelerators only, so the flag is up between the steps, when it is saved and restored."""

    def build() -> Run:
        run = trained_by(lambda parameters: kind(parameters))()
        (optimizer,) = (one for one in run.objects.values() if isinstance(one, optim.Optimizer))
        take = run.step

        def step(at: int) -> Any:
            optimizer.param_groups[0]["capturable"] = False
            loss = take(at)
            optimizer.param_groups[0]["capturable"] = True
            return loss

        run.step = step
        return run

    return build


for _kind in PLAIN:
    if "capturable" in inspect.signature(_kind).parameters:
        add(f"{_kind.__name__.lower()}-capturable", f"`torch.optim.{_kind.__name__}`", _capturable(_kind))


def _muon() -> Run:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    optimizer = optim.Muon(model.parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _sparse_adam() -> Run:
    model = nn.Embedding(7, 3, sparse=True)
    optimizer = optim.SparseAdam(model.parameters())
    picked = lambda at: torch.randint(0, 5, (4,), generator=torch.Generator().manual_seed(at))
    step = stepper(model, optimizer, loss=lambda at: (model(picked(at)) ** 2).sum())
    return Run({"model": model, "optimizer": optimizer}, step)


def _lbfgs(**options: Any) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4, **options)
        return Run({"model": model, "optimizer": optimizer}, closure_stepper(model, optimizer))

    return build


def _muon_and_adam() -> Run:
    model = small()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    one, two = optim.Muon(matrices), optim.AdamW(others)

    def step(at: int) -> Any:
        one.zero_grad()
        return stepper(model, two, one)(at)

    return Run({"model": model, "muon": one, "adamw": two}, step)


def _tensor_betas() -> Run:
    model = small()
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.01), betas=betas, foreach=False)
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


add("muon", "`torch.optim.Muon`", _muon, two_ranks=True)
add("muon-beside-adamw", "two optimizers over one module", _muon_and_adam, two_ranks=True)
add("sparseadam", "`torch.optim.SparseAdam`", _sparse_adam, two_ranks=True)
add("lbfgs", "`torch.optim.LBFGS`", _lbfgs(), two_ranks=True)
add("lbfgs-wolfe", "`torch.optim.LBFGS`", _lbfgs(line_search_fn="strong_wolfe"))
add("adam-tensor-betas", "`torch.optim.Adam`", _tensor_betas)


# ---- parameters of other dtypes ------------------------------------------------------------------------------------


def _of_dtype(dtype: torch.dtype) -> Callable[[], Run]:
    def build() -> Run:
        model = nn.Linear(6, 3, dtype=dtype)
        optimizer = optim.Adam(model.parameters(), foreach=False)
        step = stepper(model, optimizer, loss=lambda at: model(batch(at).to(dtype)).abs().pow(2).sum())
        return Run({"model": model, "optimizer": optimizer}, step)

    return build


for _dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64):
    add(f"adam-{str(_dtype)[6:]}", "parameters of any dtype", _of_dtype(_dtype))


# ---- into another optimizer ------------------------------------------------------------------------------------------


def _into(name: str, source: Callable[[Any], optim.Optimizer], target: Callable[[Any], optim.Optimizer]) -> None:
    add(
        f"{name}",
        "an optimizer's state into another kind, as torch does it",
        trained_by(source),
        twin=trained_by(target),
        exact=False,
        two_ranks=True,
    )


_into("adam-into-adamw", optim.Adam, optim.AdamW)
_into("adamw-into-adam", optim.AdamW, optim.Adam)
_into("adam-into-amsgrad", optim.Adam, lambda parameters: optim.Adam(parameters, lr=0.5, amsgrad=False, eps=0.1))
_into("adam-into-fused", optim.Adam, lambda parameters: optim.Adam(parameters, fused=True))
_into("fused-into-adam", lambda parameters: optim.Adam(parameters, fused=True), optim.Adam)
_into(
    "lr-into-tensor-lr",
    lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: optim.SGD(parameters, lr=torch.tensor(0.2), momentum=0.9, foreach=False),
)
_into(
    "tensor-lr-into-lr",
    lambda parameters: optim.SGD(parameters, lr=torch.tensor(0.2), momentum=0.9, foreach=False),
    lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
)


def _half_precision(dtype: torch.dtype) -> Callable[[], Run]:
    def build() -> Run:
        model = nn.Linear(6, 3).to(dtype)
        optimizer = optim.Adam(model.parameters(), foreach=False)
        step = stepper(model, optimizer, loss=lambda at: (model(batch(at).to(dtype)) ** 2).sum())
        return Run({"model": model, "optimizer": optimizer}, step)

    return build


add(
    "float32-into-bfloat16",
    "into parameters of another dtype, as torch converts them",
    _half_precision(torch.float32),
    twin=_half_precision(torch.bfloat16),
    exact=False,
)
add(
    "bfloat16-into-float32",
    "into parameters of another dtype, as torch converts them",
    _half_precision(torch.bfloat16),
    twin=_half_precision(torch.float32),
    exact=False,
)
