"""What a step pays for hooks: the agreement of all ranks, the hook around it, and an all-reduce of the same size alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rounds import Spans, alternate, now

import distckpt
from distckpt.training.agreement import Agreement

STEPS = 300


@dataclass
class Repeated:
    """``STEPS`` calls of one function, one after the other, as fast as they go on all ranks together."""

    name: str
    call: Callable[[int], object]

    def run(self, number: int) -> Spans:
        """All the calls."""
        dist.barrier()
        begin = now()
        for step in range(STEPS):
            self.call(step)
        return {"steps": (begin, now())}

    def clean(self, number: int) -> None:
        """Nothing is left."""


def steps(folder: str, repetitions: int) -> dict[str, Any]:
    """Seconds of ``STEPS`` steps in which no save is due, by what they consist of."""
    values, group, agreement = torch.zeros(5, dtype=torch.int64), dist.new_group(backend="gloo"), Agreement()
    count = [0]
    hook = distckpt.CheckpointSaverHook(folder, save_secs=3600)
    loop = distckpt.HookedLoop([hook], lambda: count[0], checkpoint=distckpt.Checkpoint(count=count))
    loop.begin()

    def hooked(step: int) -> None:
        loop.before_step()
        count[0] += 1
        loop.after_step()

    contenders = [
        Repeated("all-reduce", lambda _: dist.all_reduce(values, group=group)),
        Repeated("agreement", lambda step: agreement.any(False, False, False, place=step)),
        Repeated("hook", hooked),
    ]
    try:
        measured = alternate(contenders, repetitions)
        loop.end()
    finally:
        loop.close()
        agreement.close()
    return {"measured": measured, "bytes": 0}
