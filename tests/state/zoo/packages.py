"""What other packages train with: schedule-free, PEFT, torchao, torchdata, Accelerate."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim

import distckpt
from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.training import batch, closure_stepper, loss_of, small, stepper

SECTION = "packages"

add = partial(register, SECTION)


# ---- schedule-free -------------------------------------------------------------------------------------------------


def _schedule_free(name: str, mode: str, **options: Any) -> Callable[[], Run]:
    def build() -> Run:
        package = importlib.import_module("schedulefree")
        # The wrapper swaps bytes in place, which scalars cannot do.
        model = nn.Linear(6, 3) if name == "ScheduleFreeWrapper" else small()
        if name == "ScheduleFreeWrapper":
            optimizer = package.ScheduleFreeWrapper(
                optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1), momentum=0.9
            )
        else:
            optimizer = getattr(package, name)(model.parameters(), **options)
        take = (closure_stepper if name.endswith("Closure") else stepper)(model, optimizer)
        if name.endswith("Closure"):
            return Run({"model": model, "optimizer": optimizer}, take)
        if mode == "train":
            optimizer.train()

        def step(at: int) -> Any:
            optimizer.train()
            loss = take(at)
            getattr(optimizer, mode)()
            return loss

        watch = (lambda: _numbered(optimizer.base)) if name == "ScheduleFreeWrapper" else lambda: None
        return Run({"model": model, "optimizer": optimizer}, step, watch)

    return build


def _numbered(optimizer: optim.Optimizer) -> Any:
    return optimizer.state_dict()


for _name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "ScheduleFreeWrapper"):
    for _mode in ("train", "eval"):
        _options: dict[str, Any] = {"foreach": False} if _name != "ScheduleFreeWrapper" else {}
        add(
            f"{_name.lower()}-{_mode}",
            "schedule-free optimizers, in either mode",
            _schedule_free(_name, _mode, **_options),
            two_ranks=_name == "AdamWScheduleFree",
        )
add(
    "adamwschedulefreeclosure",
    "schedule-free optimizers, in either mode",
    _schedule_free("AdamWScheduleFreeClosure", "eval"),
)
add(
    "adamwschedulefree-foreach",
    "schedule-free optimizers, in either mode",
    _schedule_free("AdamWScheduleFree", "eval", foreach=True),
)


# ---- PEFT ----------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    """What the adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.query(x)))


def _lora(adapters_only: bool = False, **options: Any) -> Callable[[], Run]:
    def build() -> Run:
        peft = importlib.import_module("peft")
        base = Base()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.fill_(0.1)
        config = peft.LoraConfig(r=2, target_modules=["query"], lora_dropout=0.1, init_lora_weights=False, **options)
        model = peft.get_peft_model(base, config)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
        take = stepper(model, optimizer, loss=lambda at: (model(batch(at)) ** 2).mean())
        if not adapters_only:
            return Run({"model": model, "optimizer": optimizer}, take)
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return Run({"adapters": adapters, "optimizer": optimizer}, take)

    return build


add("lora", "LoRA and DoRA by `peft`", _lora(), two_ranks=True)
add("lora-modules-to-save", "LoRA and DoRA by `peft`", _lora(modules_to_save=["head"]))
add("dora", "LoRA and DoRA by `peft`", _lora(use_dora=True))
add("lora-adapters-only", "LoRA adapters alone, in a dict", _lora(True), two_ranks=True)


# ---- torchao -------------------------------------------------------------------------------------------------------


def _low_bit(name: str) -> Callable[[], Run]:
    """Large enough for the low-bit form of its moments; the step is not compiled."""

    def build() -> Run:
        kind = getattr(importlib.import_module("torchao.optim"), name)
        model = nn.Linear(64, 64)
        optimizer = kind(model.parameters(), lr=0.01)

        def step(at: int) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return stepper(model, optimizer, loss=lambda at: (model(batch(at, 4, 64)) ** 2).mean())(at)

        return Run({"model": model, "optimizer": optimizer}, step)

    return build


for _name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
    add(
        _name.lower(),
        "8-bit and low-bit optimizer state of `torchao`",
        _low_bit(_name),
        steps=2,
        refused=Refusal("optimizer.state."),
    )


def _quantized(config: str) -> Callable[[], Run]:
    def build() -> Run:
        quantization = importlib.import_module("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantization.quantize_(model, getattr(quantization, config)())
        return Run({"model": model}, lambda at: model(batch(at, 4, 64)).detach().sum())

    return build


for _name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
    add(_name.lower(), "quantized weights of `torchao`", _quantized(_name), steps=1, refused=Refusal("model.0.weight"))


# ---- data and Accelerate ----------------------------------------------------------------------------------------------


def _loader(per_rank: bool) -> Callable[[], Run]:
    def build() -> Run:
        module = importlib.import_module("torchdata.stateful_dataloader")
        generator = torch.Generator().manual_seed(torch.initial_seed())
        loader = module.StatefulDataLoader(list(range(40)), batch_size=2, shuffle=True, generator=generator)
        reading: list[Any] = []

        def step(at: int) -> Any:
            if not reading:
                reading.append(iter(loader))
            return next(reading[0])

        held = distckpt.PerRank(loader) if per_rank else loader
        return Run({"loader": held}, step)

    return build


add("stateful-dataloader", "`torchdata.stateful_dataloader.StatefulDataLoader`", _loader(False))
add("stateful-dataloader-per-rank", "`torchdata.stateful_dataloader.StatefulDataLoader`", _loader(True), two_ranks=True)


def _accelerated(accumulation: int) -> Callable[[], Run]:
    def build() -> Run:
        accelerate = importlib.import_module("accelerate")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model, optimizer, scheduler = small(), None, None
        optimizer = optim.AdamW(model.parameters())
        scheduler = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

        def step(at: int) -> Any:
            with accelerator.accumulate(model):
                loss = loss_of(model, at)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                return loss.detach()

        return Run({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)

    return build


add("accelerate", "objects that `Accelerator.prepare` returned", _accelerated(1))
# Gradients are no state, with torch neither, so the run that never stopped goes on with more than was saved.
add(
    "accelerate-accumulating",
    "objects that `Accelerator.prepare` returned, in the middle of an accumulation",
    _accelerated(2),
    steps=3,
    exact=False,
)
