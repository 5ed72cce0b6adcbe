"""A part of many cases, when to play all of them takes too long for every day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import hypothesis

_Case = TypeVar("_Case")

USUAL_EXAMPLES = 100
"""Of Hypothesis, where no profile says otherwise."""


@dataclass(frozen=True)
class Part:
    """Chooses by ``seed``; ``whole`` chooses all."""

    seed: int
    whole: bool = False

    def of(self, cases: Sequence[_Case], every: int) -> list[_Case]:
        """Every so-manieth of the cases, in their order; at least one if there is one."""
        if self.whole or not cases:
            return list(cases)
        return list(cases[self.seed % min(every, len(cases)) :: every])


def examples(whole: int) -> int:
    """How many examples Hypothesis tries where all are ``whole``: the part that it tries of others in this profile."""
    return max(1, whole * hypothesis.settings().max_examples // USUAL_EXAMPLES)
