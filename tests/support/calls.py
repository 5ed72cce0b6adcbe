"""Calls of a store by what they do, so that each is found again in another run, and fails there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from distckpt.testing.faults import Call, Fault, Operation


@dataclass(frozen=True, order=True)
class Place:
    """A store call by what it does: ids are left out, so that it is found again in another run."""

    operation: Operation
    path: str
    nth: int

    def __str__(self) -> str:
        return f"{self.operation} {self.path} #{self.nth}"


def _pattern(path: str) -> str:
    return re.sub(r"e\d+-[0-9a-f]{32}|[0-9a-f]{32}|\d{20}", "*", path)


@dataclass
class FaultAtPlace:
    """One fault, at one place; notes all places that it passes."""

    place: Place | None = None
    kind: Fault | None = None
    hit: bool = False
    passed: list[Place] = field(default_factory=list)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def fault(self, call: Call) -> Fault | None:
        """The fault, if this is the place."""
        pattern = _pattern(call.path)
        place = Place(call.operation, pattern, self._counts[call.operation, pattern])
        self._counts[call.operation, pattern] += 1
        self.passed.append(place)
        if place != self.place:
            return None
        self.hit = True
        return self.kind
