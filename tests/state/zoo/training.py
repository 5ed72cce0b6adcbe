"""What the entries have in common: small things to train, and how to train them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tests.state.zoo.entry import Run


def small() -> nn.Module:
    """Matrices, vectors and a scalar to train; nothing random but the seed."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    model.register_parameter("scale", nn.Parameter(torch.rand(())))
    return model


def batch(at: int, *shape: int) -> torch.Tensor:
    """The data of one step."""
    return torch.randn(*(shape or (4, 6)), generator=torch.Generator().manual_seed(100 + at))


def loss_of(model: nn.Module, at: int, data: torch.Tensor | None = None) -> torch.Tensor:
    """A loss that depends on every parameter of ``small``, and on every output of another model."""
    out = model(batch(at) if data is None else data)
    scale = getattr(model, "scale", None)
    return (out**2).mean() * (1.0 if scale is None else scale) + out.mean()


def stepper(
    model: nn.Module,
    optimizer: Any,
    *more: Any,
    loss: Callable[[int], torch.Tensor] | None = None,
) -> Callable[[int], Any]:
    """A training step: forward, backward, the optimizer, and then every one of ``more``'s ``step``."""

    def step(at: int) -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(at) if loss is not None else loss_of(model, at)
        value.backward()
        optimizer.step()
        for one in more:
            one.step()
        return value.detach()

    return step


def closure_stepper(model: nn.Module, optimizer: Any) -> Callable[[int], Any]:
    """A training step for an optimizer that evaluates the loss itself."""

    def step(at: int) -> torch.Tensor:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss_of(model, at)
            value.backward()
            return value

        return torch.as_tensor(optimizer.step(closure)).detach()

    return step


Making = Callable[[Iterable[Any]], torch.optim.Optimizer]


def trained_by(
    make: Making, model: Callable[[], nn.Module] = small, loss: Callable[[nn.Module, int], torch.Tensor] = loss_of
) -> Callable[[], Run]:
    """A builder of runs: this model, and an optimizer over all of its parameters."""

    def build() -> Run:
        module = model()
        optimizer = make(module.parameters())
        step = stepper(module, optimizer, loss=lambda at: loss(module, at))
        return Run({"model": module, "optimizer": optimizer}, step)

    return build
