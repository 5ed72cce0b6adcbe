"""Optimizers that wrap another one or keep more than state and param_groups, averaged models, objects of one's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from tests.state.zoo.entry import Run, register
from tests.state.zoo.training import batch, loss_of, small, stepper

SECTION = "wrappers"

add = partial(register, SECTION)


class Lookahead(optim.Optimizer):
    """The widely copied Lookahead: slow weights of its own beside an inner optimizer, in one state_dict."""

    def __init__(self, inner: optim.Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer = inner
        self.k, self.alpha = k, alpha
        self.param_groups = inner.param_groups
        self.defaults = inner.defaults
        self.state: Any = defaultdict(dict)
        self.fast_state = inner.state
        for group in self.param_groups:
            group["counter"] = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            if group["counter"] == 0:
                for fast in group["params"]:
                    self._update(fast)
            group["counter"] = (group["counter"] + 1) % self.k
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def _update(self, fast: torch.Tensor) -> None:
        own = self.state[fast]
        if "slow" not in own:
            own["slow"] = fast.detach().clone()
        own["slow"] += (fast - own["slow"]) * self.alpha
        fast.copy_(own["slow"])

    def state_dict(self) -> dict[str, Any]:
        inner = self.optimizer.state_dict()
        numbers = {id(p): n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}
        slow = {numbers[id(p)]: dict(value) for p, value in self.state.items()}
        return {"fast_state": inner["state"], "slow_state": slow, "param_groups": inner["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict({"state": state["fast_state"], "param_groups": state["param_groups"]})
        self.param_groups = self.optimizer.param_groups
        self.fast_state = self.optimizer.state
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state = defaultdict(dict, {parameters[n]: dict(value) for n, value in state["slow_state"].items()})


class Sam(optim.Optimizer):
    """Sharpness-aware minimization as it is passed around: it shares the groups of a base optimizer."""

    def __init__(
        self, parameters: Iterable[Any], base: type[optim.Optimizer], rho: float = 0.05, **options: Any
    ) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        return self.base_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"sam": super().state_dict(), "base": self.base_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["sam"])
        self.base_optimizer.load_state_dict(state["base"])
        self.base_optimizer.param_groups = self.param_groups


class Delegating(optim.Optimizer):
    """Looks like an optimizer and hands everything to another, as Accelerate's and Horovod's do."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner
        self.steps = 0

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Chained(optim.Optimizer):
    """One for each part of the parameters, in a list and a dict of which torch's ``state_dict`` says nothing."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        first, *rest = parameters
        super().__init__([first, *rest], {})
        self.parts = [optim.SGD([first], lr=0.1, momentum=0.9)]
        self.others = {"rest": optim.Adam(rest)}

    def step(self, closure: Any = None) -> Any:
        for optimizer in (*self.parts, *self.others.values()):
            optimizer.step()


class Scaled:
    """No Optimizer at all: holds one, and a scale."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner
        self.scale = 1.0

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.scale *= 1.5
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.scale = state["scale"]


class WithMore(optim.SGD):
    """``state_dict`` holds more than state and param_groups."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.total = 0
        self.average = torch.zeros(3)

    def step(self, closure: Any = None) -> Any:
        self.total += 1
        self.average = self.average * 0.9 + self.total
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total": self.total, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.total, self.average = state.pop("total"), state.pop("average")
        super().load_state_dict(state)


class GlobalState(optim.Optimizer):
    """Keeps state that belongs to no parameter under names, and a master copy in float32 of every parameter."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.state["count"] = 0
        self.state["norms"] = {"last": torch.zeros(()), "all": []}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.state["count"] += 1
        norms = self.state["norms"]
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                own["matrix"] = p.ndim == 2
                own.setdefault("history", []).append(float(p.grad.norm()))
                own["sizes"] = tuple(p.shape)
                own["nested"] = {"sum": p.grad.clone(), "none": None}
                norms["last"] = p.grad.norm()
                p.sub_(p.grad, alpha=group["lr"] / self.state["count"])
        norms["all"].append(self.state["count"])


def _wrapping(make: Callable[[Iterable[Any]], Any], watch: Callable[[Any], Any]) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        optimizer = make(model.parameters())
        return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer), lambda: watch(optimizer))

    return build


def _by_number(optimizer: optim.Optimizer) -> Any:
    return optim.Optimizer.state_dict(optimizer)


def _sam() -> Run:
    model = small()
    optimizer = Sam(model.parameters(), optim.SGD, lr=0.1, momentum=0.9)

    def step(at: int) -> Any:
        model.zero_grad()
        loss_of(model, at).backward()
        optimizer.climb()
        model.zero_grad()
        loss = loss_of(model, at)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Run({"model": model, "optimizer": optimizer}, step, lambda: _by_number(optimizer.base_optimizer))


add(
    "lookahead",
    "Lookahead",
    _wrapping(lambda p: Lookahead(optim.Adam(p)), lambda o: _by_number(o.optimizer)),
    two_ranks=True,
)
add("sam", "SAM", _sam, two_ranks=True)
add(
    "delegating",
    "an optimizer that delegates to another",
    _wrapping(lambda p: Delegating(optim.Adam(p)), lambda o: _by_number(o.inner)),
    two_ranks=True,
)
add(
    "holding",
    "any object that holds an optimizer and has `state_dict` and `load_state_dict`",
    _wrapping(lambda p: Scaled(optim.Adam(p)), lambda o: (o.scale, _by_number(o.inner))),
    two_ranks=True,
)
add(
    "chained",
    "an optimizer that keeps others in a list or dict",
    _wrapping(Chained, lambda o: [_by_number(one) for one in (*o.parts, *o.others.values())]),
    torch_can=False,
    two_ranks=True,
)
add(
    "more-than-state",
    "an optimizer whose `state_dict` holds more than `state` and `param_groups`",
    _wrapping(WithMore, lambda o: (o.total, o.average)),
    two_ranks=True,
)
add(
    "global-state",
    "an optimizer with state of no parameter, and plain values in its state",
    _wrapping(GlobalState, lambda o: None),
    two_ranks=True,
)


class Masters(optim.Optimizer):
    """Keeps float32 masters of bfloat16 parameters, which torch's own load_state_dict casts."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                own.setdefault("master", p.float())
                own["master"] = own["master"] - group["lr"] * p.grad.float()
                p.copy_(own["master"])


def _masters() -> Run:
    model = nn.Linear(6, 3).bfloat16()
    optimizer = Masters(model.parameters())
    step = stepper(model, optimizer, loss=lambda at: (model(batch(at).bfloat16()) ** 2).sum())
    return Run({"model": model, "optimizer": optimizer}, step)


add("masters", "state of another dtype than its parameter, as torch converts it", _masters, exact=False)


class ConvertsItself(optim.Optimizer):
    """Overrides ``load_state_dict`` so that nothing is cast: its masters stay as they are."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    step = Masters.step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            self.state[parameters[number]] = {k: v.clone() for k, v in values.items()}


def _converts_itself() -> Run:
    model = nn.Linear(6, 3).bfloat16()
    optimizer = ConvertsItself(model.parameters())
    step = stepper(model, optimizer, loss=lambda at: (model(batch(at).bfloat16()) ** 2).sum())
    return Run({"model": model, "optimizer": optimizer}, step)


add("own-load-state-dict", "an optimizer with a `load_state_dict` of its own", _converts_itself)
