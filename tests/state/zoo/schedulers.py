"""Every scheduler of torch.optim.lr_scheduler, restored before or after its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import optim
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR

from tests.state.zoo.entry import Run, register
from tests.state.zoo.training import small, stepper

SECTION = "schedulers"

add = partial(register, SECTION)


class Warmup:
    """A schedule with a state of its own, which LambdaLR saves."""

    def __init__(self) -> None:
        self.asked = 0
        self.seen: list[int] = []

    def __call__(self, epoch: int) -> float:
        self.asked += 1
        self.seen.append(epoch)
        return 1.0 / (1 + self.asked)


def _sequential(optimizer: optim.Optimizer) -> Any:
    parts = [
        lr.ConstantLR(optimizer, 0.1, 2),
        lr.ExponentialLR(optimizer, 0.9),
        lr.MultiStepLR(optimizer, [1, 1, 2], 0.5),
    ]
    return lr.SequentialLR(optimizer, parts, [2, 4])


def _chained(optimizer: optim.Optimizer) -> Any:
    return lr.ChainedScheduler([lr.ConstantLR(optimizer, 0.1, 2), lr.MultiStepLR(optimizer, [1, 2], 0.5)], optimizer)


def _nested(optimizer: optim.Optimizer) -> Any:
    return lr.ChainedScheduler([_sequential(optimizer), lr.StepLR(optimizer, 2, 0.5)], optimizer)


Making = Callable[[optim.Optimizer], Any]

MAKERS: dict[str, tuple[str, Making]] = {
    "lambda": ("LambdaLR", lambda o: lr.LambdaLR(o, lambda epoch: 0.9**epoch)),
    "lambda-object": ("LambdaLR", lambda o: lr.LambdaLR(o, Warmup())),
    "lambda-partial": ("LambdaLR", lambda o: lr.LambdaLR(o, partial(math.pow, 0.9))),
    "multiplicative": ("MultiplicativeLR", lambda o: lr.MultiplicativeLR(o, lambda epoch: 0.95)),
    "step": ("StepLR", lambda o: lr.StepLR(o, 2, 0.5)),
    "multistep": ("MultiStepLR", lambda o: lr.MultiStepLR(o, [1, 2, 2, 4], 0.5)),
    "constant": ("ConstantLR", lambda o: lr.ConstantLR(o, 0.5, 4)),
    "linear": ("LinearLR", lambda o: lr.LinearLR(o, 0.3, 1.0, 5)),
    "exponential": ("ExponentialLR", lambda o: lr.ExponentialLR(o, 0.9)),
    "sequential": ("SequentialLR", _sequential),
    "chained-sequential": ("ChainedScheduler", _nested),
    "cosine": ("CosineAnnealingLR", lambda o: lr.CosineAnnealingLR(o, 10, 0.001)),
    "chained": ("ChainedScheduler", _chained),
    "cyclic": ("CyclicLR", lambda o: lr.CyclicLR(o, 0.01, 0.1, 2, 3, mode="exp_range", gamma=0.9)),
    "cyclic-scaled": ("CyclicLR", lambda o: lr.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 0.9**x)),
    "warm-restarts": ("CosineAnnealingWarmRestarts", lambda o: lr.CosineAnnealingWarmRestarts(o, 2, 2)),
    "one-cycle": ("OneCycleLR", lambda o: lr.OneCycleLR(o, 0.2, 12)),
    "polynomial": ("PolynomialLR", lambda o: lr.PolynomialLR(o, 9, 2.0)),
    "swalr": ("SWALR", lambda o: SWALR(o, 0.02, 4)),
}


def _run(make: Making, tensor: bool, first: str, groups: int = 1) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        rate: Any = torch.tensor(0.05) if tensor else 0.05
        parameters = list(model.parameters())
        parts = [{"params": parameters}] if groups == 1 else [{"params": parameters[:2]}, {"params": parameters[2:]}]
        optimizer = optim.SGD(parts, lr=rate, momentum=0.9, foreach=False)
        scheduler = make(optimizer)
        objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        if first == "scheduler":
            objects = {"scheduler": scheduler, "optimizer": optimizer, "model": model}
        return Run(objects, stepper(model, optimizer, scheduler))

    return build


for _name, (_kind, _make) in MAKERS.items():
    _shown = f"`torch.optim.{'swa_utils' if _kind == 'SWALR' else 'lr_scheduler'}.{_kind}`"
    add(f"{_name}-after", _shown, _run(_make, False, "model"), steps=2, two_ranks=_name in ("sequential", "multistep"))
    add(f"{_name}-before", _shown, _run(_make, False, "scheduler"), steps=3)

for _name in ("lambda", "step", "multistep", "exponential", "sequential", "cosine", "chained", "linear"):
    add(
        f"{_name}-tensor-lr",
        "schedulers with a tensor as learning rate",
        _run(MAKERS[_name][1], True, "model"),
        two_ranks=_name == "step",
    )
    add(f"{_name}-groups", "schedulers of several parameter groups", _run(MAKERS[_name][1], False, "model", 2))


def _plateau(first: str, tensor: bool = False) -> Callable[[], Run]:
    def build() -> Run:
        run = _run(lambda o: lr.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.1), tensor, first)()
        model, optimizer, scheduler = (run.objects[name] for name in ("model", "optimizer", "scheduler"))
        take = stepper(model, optimizer)

        def step(at: int) -> Any:
            loss = take(at)
            scheduler.step(1.0 + at % 3)
            return loss

        run.step = step
        return run

    return build


_PLATEAU = "`torch.optim.lr_scheduler.ReduceLROnPlateau`"
add("plateau-after", _PLATEAU, _plateau("model"), two_ranks=True)
add("plateau-before", _PLATEAU, _plateau("scheduler"), steps=4)
add("plateau-not-stepped", _PLATEAU, _plateau("model"), steps=0)
add("plateau-tensor-lr", "schedulers with a tensor as learning rate", _plateau("model", True))


def _alone() -> Run:
    run = _run(MAKERS["multistep"][1], False, "model")()
    objects = {"scheduler": run.objects["scheduler"]}
    return Run(objects, lambda at: run.step(at) * 0)


add("without-optimizer", "a scheduler whose optimizer is not in the checkpoint", _alone, exact=False)
add("not-stepped", "a scheduler that has not stepped", _run(MAKERS["sequential"][1], False, "model"), steps=0)
