"""Averaged models, and objects of the program's own with state_dict and load_state_dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import distckpt
from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.training import small, stepper

SECTION = "wrappers"

add = partial(register, SECTION)


# ---- averaged models -----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A model with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def _averaged(make: Callable[[nn.Module], AveragedModel], swa: bool = False) -> Callable[[], Run]:
    def build() -> Run:
        model = Normed()
        averaged = make(model)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        objects: dict[str, Any] = {"model": model, "averaged": averaged, "optimizer": optimizer}
        if swa:
            objects["swa_lr"] = SWALR(optimizer, 0.01, 3)
        take = stepper(model, optimizer, *([objects["swa_lr"]] if swa else []))

        def step(at: int) -> Any:
            loss = take(at)
            averaged.update_parameters(model)
            return loss

        return Run(objects, step)

    return build


class HandEma:
    """Averages in a dict of its own, as most programs have them."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for name, p in model.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


def _hand_ema(form: str) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        optimizer = optim.Adam(model.parameters())
        ema = HandEma(model)
        objects: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimizer}
        if form == "dict":
            objects["ema"] = ema.shadow
        if form == "copy":
            objects["ema"] = copy.deepcopy(model)
        take = stepper(model, optimizer)

        @torch.no_grad()
        def step(at: int) -> Any:
            with torch.enable_grad():
                loss = take(at)
            if form == "copy":
                for mine, other in zip(objects["ema"].parameters(), model.parameters(), strict=True):
                    mine.lerp_(other, 0.1)
            else:
                ema.update(model)
            return loss

        return Run(objects, step)

    return build


_AVERAGED = "`torch.optim.swa_utils.AveragedModel`: SWA and EMA"
add("swa", _AVERAGED, _averaged(AveragedModel, swa=True), two_ranks=True)
add("swa-not-updated", _AVERAGED, _averaged(AveragedModel), steps=0)
add("swa-buffers", _AVERAGED, _averaged(lambda m: AveragedModel(m, use_buffers=True)), two_ranks=True)
add("ema", _AVERAGED, _averaged(lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))))
add("ema-by-hand", "averages in an object of the program's own", _hand_ema("object"), two_ranks=True)
add("ema-dict", "averages in a dict whose tensors every step replaces", _hand_ema("dict"), two_ranks=True)
add("ema-copy", "averages in a second model", _hand_ema("copy"))


# ---- objects with state_dict and load_state_dict -----------------------------------------------------------------------


class Counter:
    """A data cursor."""

    def __init__(self) -> None:
        self.state: Any = {"epoch": 0, "seen": [], "buffer": torch.zeros(2), "empty": {}, "best": None}

    def step(self) -> None:
        at = self.state["epoch"]
        self.state = {
            "epoch": at + 1,
            "seen": [*self.state["seen"], (at, f"file-{at}")],
            "buffer": torch.arange(float(at + 3)),
            "empty": {} if at % 2 else {"x": {}},
            "best": {"at": at, 3: torch.ones(2)},
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class OddState(Counter):
    """Its ``state_dict`` is whatever it was given: torch asks for no dict."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make, self.at = make, 0
        self.state = make(0)

    def step(self) -> None:
        self.at += 1
        self.state = self.make(self.at)


def _stateful(make: Callable[[], Any], per_rank: bool = False) -> Callable[[], Run]:
    def build() -> Run:
        one = make()
        if hasattr(one, "step"):
            if torch.initial_seed() == 0:
                one.step()
            held = distckpt.PerRank(one) if per_rank else one

            def step(at: int) -> Any:
                one.step()
                return at

            return Run({"cursor": held}, step, lambda: one.state)
        raise AssertionError

    return build


_STATEFUL = "objects with `state_dict` and `load_state_dict`"
add("stateful", _STATEFUL, _stateful(Counter), two_ranks=True)
add("stateful-per-rank", "`PerRank` around objects", _stateful(Counter, True), two_ranks=True)
for _name, _make in {
    "list": lambda n: [n, torch.ones(n)],
    "int": lambda n: n,
    "none": lambda n: None if n else 1,
    "tensor": lambda n: torch.arange(float(n)),
    "empty": lambda n: {} if n else {"a": 1},
    "int-keys": lambda n: {0: "a", 1: {2: n}, (1, 2): 3, None: n},
}.items():
    # The state does not say how many steps were taken, so going on means nothing.
    add(f"stateful-{_name}", _STATEFUL, _stateful(lambda make=_make: OddState(make)), steps=3, exact=False)
add(
    "stateful-object",
    "state that only pickle could store",
    _stateful(lambda: OddState(lambda n: {"fn": lambda: n})),
    refused=Refusal("cursor.fn"),
)
