"""One entry for each kind of thing that people train with; importing this registers all of them."""

from tests.state.zoo import (
    averages,
    checkpoint,
    modules,
    optimizers,
    packages,
    schedulers,
    situations,
    tensors,
    values,
    wrapped,
    wrappers,
)
from tests.state.zoo.entry import ENTRIES, Entry, Refusal, Run

__all__ = [
    "ENTRIES",
    "Entry",
    "Refusal",
    "Run",
    "averages",
    "checkpoint",
    "modules",
    "optimizers",
    "packages",
    "schedulers",
    "situations",
    "tensors",
    "values",
    "wrapped",
    "wrappers",
]
