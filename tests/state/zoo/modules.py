"""Modules: what they keep besides parameters, what hooks make of it, and what they are wrapped in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.training import loss_of, small, stepper, trained_by

SECTION = "modules"

add = partial(register, SECTION)


def sgd(parameters: Any) -> optim.Optimizer:
    """The optimizer of entries that are not about optimizers."""
    return optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> optim.Optimizer:
    """Another one, whose state is made by its first step."""
    return optim.Adam(parameters)


# ---- extra state ---------------------------------------------------------------------------------------------------


class WithExtra(nn.Module):
    """Keeps something that is neither parameter nor buffer, and changes it in every step."""

    def __init__(self, first: Any, later: Callable[[int], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.extra = first
        self.later = later
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.initial_seed() % 1000  # the number of the step, whatever has been restored
        self.extra = self.later(4 + at)
        self.calls = at
        return self.linear(x)

    def get_extra_state(self) -> Any:
        return {"extra": self.extra, "calls": self.calls} if self._packed() else self.extra

    def set_extra_state(self, state: Any) -> None:
        if self._packed():
            self.extra, self.calls = state["extra"], state["calls"]
        else:
            self.extra = state

    def _packed(self) -> bool:
        return False


class WithPackedExtra(WithExtra):
    """The same in a dict."""

    def _packed(self) -> bool:
        return True


def _extra(kind: type[WithExtra], first: Any, later: Callable[[int], Any]) -> Callable[[], Run]:
    def build() -> Run:
        model = nn.Sequential(kind(copy.deepcopy(first), later), nn.Tanh(), nn.Linear(3, 2))
        optimizer = sgd(model.parameters())
        held = model.get_submodule("0")
        return Run(
            {"model": model, "optimizer": optimizer},
            stepper(model, optimizer),
            lambda: held.extra,
        )

    return build


EXTRAS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "bytes": (b"", lambda n: bytes(range(n))),
    "int": (0, lambda n: n),
    "float": (0.0, lambda n: n / 7),
    "str": ("", lambda n: "x" * n),
    "none": (1, lambda n: None),
    "from-none": (None, lambda n: {"at": n}),
    "tensor": (torch.zeros(4), lambda n: torch.arange(4.0) * n),
    "tensor-longer": (torch.zeros(2), lambda n: torch.arange(float(n))),
    "tensor-scalar": (torch.zeros(()), lambda n: torch.tensor(float(n))),
    "tensor-uint8": (torch.zeros(0, dtype=torch.uint8), lambda n: torch.arange(n, dtype=torch.uint8)),
    "dict": ({}, lambda n: {"scale": n / 3, "names": ["a"] * n, 3: (1, None)}),
    "dict-of-tensors": ({}, lambda n: {"amax": torch.full((n,), 2.0), "history": [torch.ones(2), n]}),
    "list": ([], lambda n: [n, "a", [n / 2]]),
    "tuple": ((), lambda n: (n, b"raw")),
    "empty-dict": ({"a": 1}, lambda n: {}),
}
for _name, (_first, _later) in EXTRAS.items():
    add(f"extra-state-{_name}", "`get_extra_state` of any plain type or tensor", _extra(WithExtra, _first, _later))
add(
    "extra-state-packed",
    "`get_extra_state` of any plain type or tensor",
    _extra(WithPackedExtra, *EXTRAS["bytes"]),
    two_ranks=True,
)
add(
    "extra-state-packed-tensors",
    "`get_extra_state` of any plain type or tensor",
    _extra(WithPackedExtra, *EXTRAS["dict-of-tensors"]),
    two_ranks=True,
)
add(
    "extra-state-object",
    "`get_extra_state` of an object that only pickle could store",
    _extra(WithExtra, None, lambda n: object()),
    refused=Refusal("model.0._extra_state"),
)


# ---- hooks ---------------------------------------------------------------------------------------------------------


def _renaming() -> Run:
    """The state dict has other names than the module."""
    model = small()

    def on_save(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}old.weight"] = state.pop(f"{prefix}0.weight")

    def on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}0.weight"] = state.pop(f"{prefix}old.weight")

    model.register_state_dict_post_hook(on_save)
    model.register_load_state_dict_pre_hook(on_load)
    optimizer = sgd(model.get_submodule("2").parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _copying() -> Run:
    """The state dict has copies, in another dtype and order, which loading turns back."""
    model = small()

    def on_save(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}0.weight"] = state[f"{prefix}0.weight"].double().t().contiguous() * 2

    def on_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}0.weight"] = (state[f"{prefix}0.weight"] / 2).t().float()

    model.register_state_dict_post_hook(on_save)
    model.register_load_state_dict_pre_hook(on_load)
    optimizer = sgd(model.parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


class Overriding(nn.Module):
    """Saves a computed value in ``_save_to_state_dict`` and takes it apart again in ``_load_from_state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.linear(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}seen"] = torch.tensor(self.seen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.seen = int(state_dict.pop(f"{prefix}seen"))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _overriding() -> Run:
    model = nn.Sequential(Overriding(), nn.Linear(3, 2))
    optimizer = sgd(model.parameters())
    held = model.get_submodule("0")
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer), lambda: held.seen)


class OwnStateDict(nn.Module):
    """Overrides ``state_dict`` and ``load_state_dict`` themselves, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3)
        self.adapter = nn.Linear(3, 3)
        self.base.requires_grad_(False)
        nn.init.constant_(self.base.weight, 0.1)
        nn.init.constant_(self.base.bias, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.base(x))

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict(*args, **options).items() if "adapter" in key}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False, assign=assign)


def _own_state_dict() -> Run:
    model = OwnStateDict()
    optimizer = adam(model.adapter.parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _counting_loads() -> Run:
    """Hooks after a load must run, as they do with torch: once, after everything is there."""
    model = small()
    sums: list[float] = []

    def after(module: nn.Module, keys: Any) -> None:
        sums.append(float(sum(parameter.detach().sum() for parameter in module.parameters())))

    model.register_load_state_dict_post_hook(after)
    optimizer = sgd(model.parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer), lambda: sums[-1:])


add("hooks-rename", "state-dict and load hooks that rename", _renaming, two_ranks=True)
add("hooks-transform", "state-dict and load hooks that copy or transform", _copying, two_ranks=True)
add("save-to-state-dict", "modules with their own `_save_to_state_dict`", _overriding, two_ranks=True)
add("own-state-dict", "modules with their own `state_dict` and `load_state_dict`", _own_state_dict)
add("load-hooks-run", "hooks after `load_state_dict`", _counting_loads, exact=False)


# ---- buffers -------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Buffers of many kinds, one of them not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("low", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("table", torch.linspace(0, 1, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x) * self.table
        self.calls += 1
        self.seen |= out.detach().sum(0) > 0
        self.low += out.detach().mean(0).bfloat16()
        return out


class Replacing(nn.Module):
    """Puts a new tensor into its buffer at every step, as running statistics often do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean


class Normed(nn.Module):
    """Batch, group and instance norms, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 1)
        self.batch = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch(self.conv(x.reshape(4, 2, 3)))
        return self.dropout(self.group(self.instance(self.cumulative(x))))


add("buffers", "buffers of any dtype, also None and not persistent", trained_by(sgd, Buffers), two_ranks=True)
add("buffers-replaced", "buffers that every step replaces", trained_by(sgd, Replacing), two_ranks=True)
add("norms", "batch, group and instance norms, dropout", trained_by(adam, Normed), two_ranks=True)
add("lstm", "recurrent layers", trained_by(adam, lambda: Recurrent()))
add("channels-last", "parameters in another memory format", trained_by(adam, lambda: Images()))
add("transposed", "parameters that are not contiguous", trained_by(adam, lambda: Transposed()))


class Recurrent(nn.Module):
    """An LSTM, whose weights are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x.reshape(4, 2, 3))[0]


class Images(nn.Module):
    """A convolution in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.reshape(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last))


class Transposed(nn.Module):
    """A weight that is the transpose of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 6).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


# ---- tied weights --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head that share their weight, or do not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        if tied:
            self.head.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)))


class SharedModule(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def _tied(tied: bool, optimizer: bool = True) -> Callable[[], Run]:
    def build() -> Run:
        run = trained_by(adam, lambda: Tied(tied))()
        return run if optimizer else Run({"model": run.objects["model"]}, run.step)

    return build


add("tied", "tied weights", _tied(True), two_ranks=True)
add("tied-into-untied", "tied weights into untied and back", _tied(True, False), twin=_tied(False, False), exact=False)
add("untied-into-tied", "tied weights into untied and back", _tied(False, False), twin=_tied(True, False), exact=False)
add("shared-module", "one module under two names", trained_by(adam, SharedModule), two_ranks=True)


def _shared_between() -> Run:
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    optimizer = adam({id(p): p for p in (*one.parameters(), *two.parameters())}.values())
    step = stepper(one, optimizer, loss=lambda at: loss_of(one, at) + loss_of(two, at))
    return Run({"one": one, "two": two, "optimizer": optimizer}, step)


add("tied-between-modules", "a weight that two modules of the checkpoint share", _shared_between, two_ranks=True)
