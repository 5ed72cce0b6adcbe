"""What an entry of the zoo is, and the register of all entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import distckpt

ADVICE = (
    r"(?i)\b(give|wrap|store|use|call|convert|make|move|put|take|initiali[sz]e|materiali[sz]e|save|leave|name|pass|"
    r"write|keep|build|run|replace|define|turn)\b"
)


@dataclass(slots=True)
class Run:
    """One training run: what it gives to its checkpoint, and how it takes a step.

    ``step`` gets the number of the step and returns the loss. ``watch`` returns what else must be alike in two runs
    that are in the same state. ``torch_load`` takes over the state of another run as torch does it.
    """

    objects: dict[str, Any]
    step: Callable[[int], Any] = lambda at: None
    watch: Callable[[], Any] = lambda: None
    checkpoint: distckpt.Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = distckpt.Checkpoint(**self.objects)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error that an entry must end in: it names ``key`` and says what to do, in words that match ``advice``."""

    key: str
    advice: str = ADVICE


Oracle = Callable[[Run, Run], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of thing, and what is expected of it.

    ``build`` makes a run out of nothing but the random seed; ``twin`` makes the one that is restored into, where that
    is another. ``oracle`` restores the twin from the first run as torch does it, None where torch cannot.
    ``exact`` says that torch's way, and so ours, ends in the very state of the run that never stopped.
    ``two_ranks`` says that two ranks with equal state try it too.
    """

    name: str
    section: str
    kind: str
    build: Callable[[], Run]
    twin: Callable[[], Run]
    steps: int
    oracle: Oracle | None
    exact: bool
    refused: Refusal | None
    two_ranks: bool

    def start(self, seed: int) -> Run:
        """The run that trains and is saved."""
        set_seeds(seed)
        return self.build()

    def start_twin(self, seed: int) -> Run:
        """The run that is restored into."""
        set_seeds(seed)
        return self.twin()


ENTRIES: dict[str, Entry] = {}


def register(
    section: str,
    name: str,
    kind: str,
    build: Callable[[], Run],
    *,
    twin: Callable[[], Run] | None = None,
    steps: int = 3,
    oracle: Oracle | None = None,
    torch_can: bool = True,
    exact: bool = True,
    refused: Refusal | None = None,
    two_ranks: bool = False,
) -> None:
    """Add an entry to the zoo. The default oracle is ``load_state_dict(state_dict())`` of each object in order."""
    from tests.state.zoo.oracle import restore_by_torch

    full = f"{section}/{name}"
    assert full not in ENTRIES, full
    ENTRIES[full] = Entry(
        full,
        section,
        kind,
        build,
        twin or build,
        steps,
        (oracle or restore_by_torch) if torch_can else None,
        exact,
        refused,
        two_ranks,
    )


def set_seeds(seed: int) -> None:
    """Put every global random number generator where this seed begins."""
    # torch.manual_seed keeps a whole stack, as text, for each kind of device that is not there.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def take_steps(run: Run, first: int, count: int) -> list[Any]:
    """Steps ``first`` and following, each with random numbers of its own; the losses."""
    losses = []
    for at in range(first, first + count):
        set_seeds(1000 + at)
        losses.append(run.step(at))
    return losses
