"""Contenders measured in alternation: every round runs each of them once, so that drift of the machine hits all alike."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist

Spans = dict[str, tuple[float, float]]
"""For each thing that is measured its begin and its end on this rank: seconds of a clock that all processes of the host
share, or what a counter of bytes showed."""

Measured = dict[str, dict[str, list[tuple[float, float]]]]
"""For each contender, and each thing that is measured, the spans of all rounds that count."""


class Contender(Protocol):
    """Does the same work as the others in its own way."""

    name: str

    def run(self, number: int) -> Spans:
        """Do it once. ``number`` counts up from 0; all ranks call it together."""

    def clean(self, number: int) -> None:
        """Remove what ``run(number)`` has left on disk."""


def now() -> float:
    """Seconds on a clock that all processes of a host share."""
    return time.perf_counter()


def alternate(contenders: Sequence[Contender], repetitions: int) -> Measured:
    """One round to warm up, then ``repetitions`` that count; a different contender begins each round."""
    measured: Measured = {contender.name: {} for contender in contenders}
    for number in range(repetitions + 1):
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            _settle()
            spans = contender.run(number)
            dist.barrier()
            contender.clean(number)
            if number:
                for what, span in spans.items():
                    measured[contender.name].setdefault(what, []).append(span)
    return measured


def _settle() -> None:
    """Let no earlier write still be on its way to the disk, and begin together."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def together(results: Sequence[Measured], contender: str, what: str) -> list[float]:
    """Seconds from the first rank's begin to the last rank's end, round by round."""
    rounds = zip(*(result[contender][what] for result in results), strict=True)
    return [max(end for _, end in spans) - min(begin for begin, _ in spans) for spans in rounds]


def longest(results: Sequence[Measured], contender: str, what: str) -> list[float]:
    """Seconds of the rank that took longest, round by round."""
    rounds = zip(*(result[contender][what] for result in results), strict=True)
    return [max(end - begin for begin, end in spans) for spans in rounds]


def in_all(results: Sequence[Measured], contender: str, what: str) -> list[float]:
    """The sum of what all ranks' counters counted, round by round."""
    rounds = zip(*(result[contender][what] for result in results), strict=True)
    return [sum(end - begin for begin, end in spans) for spans in rounds]
