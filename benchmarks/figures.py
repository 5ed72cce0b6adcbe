"""Figures with their targets, and the table that they are printed in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEADER = ("", "median", "min", "max", "target", "")


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured. ``samples`` are its repetitions, ``value`` what stands for them.

    ``target`` None: it is only shown for comparison. ``sense`` says on which side of the target the figure should be.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    value: float
    target: float | None = None
    sense: Literal["at least", "at most"] = "at most"

    @property
    def verdict(self) -> str:
        """Pass, MISS, or nothing where there is no target."""
        if self.target is None:
            return ""
        good = self.value >= self.target if self.sense == "at least" else self.value <= self.target
        return "pass" if good else "MISS"

    def row(self) -> tuple[str, ...]:
        """The cells of its line in the table."""
        target = "" if self.target is None else f"{self.sense} {_text(self.target)} {self.unit}"
        numbers = (f"{_text(number)} {self.unit}" for number in (self.value, min(self.samples), max(self.samples)))
        return (self.name, *numbers, target, self.verdict)


def plain(
    name: str,
    unit: str,
    samples: Sequence[float],
    target: float | None = None,
    sense: Literal["at least", "at most"] = "at most",
) -> Figure:
    """A figure whose value is the median of its samples."""
    return Figure(name, unit, tuple(samples), statistics.median(samples), target, sense)


def ratio(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    target: float | None = None,
    sense: Literal["at least", "at most"] = "at most",
) -> Figure:
    """The median of one divided by the median of the other; its samples are the quotients of the same rounds."""
    samples = tuple(one / other for one, other in zip(above, below, strict=True))
    return Figure(name, "x", samples, statistics.median(above) / statistics.median(below), target, sense)


def table(title: str, figures: Sequence[Figure]) -> str:
    """The figures below each other, under ``title``."""
    rows = [HEADER, *(figure.row() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(_padded(cell, width, at) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join((title, *(line.rstrip() for line in lines)))


def _padded(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if 0 < column < 4 else cell.ljust(width)


def _text(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
