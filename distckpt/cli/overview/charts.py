"""Pictures as SVG, drawn for a page that has no scripts. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 200
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 24
MOST_POINTS = 600
"""More are thinned out: nobody could tell them apart."""


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a place, with the words that are shown when it is pointed at."""

    x: float
    y: float
    words: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a place: a line from top to bottom."""

    x: float
    words: str
    style: str


@dataclass(frozen=True, slots=True)
class Span:
    """Something that went on from one place to another, in a row of its own kind."""

    begin: float
    end: float
    words: str
    style: str


def line_chart(
    points: Sequence[Point],
    x_words: Callable[[float], str],
    y_words: Callable[[float], str],
    marks: Sequence[Mark] = (),
) -> str:
    """Values over places, joined by a line. ``x_words`` and ``y_words`` say what the ends of the axes are."""
    points = thinned(points)
    places = [each.x for each in points] + [mark.x for mark in marks]
    across = _Scale.of(places, LEFT, WIDTH - RIGHT)
    values = [point.y for point in points]
    up = _Scale.of([*values, min(0.0, *values)] if values else [0.0], HEIGHT - BOTTOM, TOP)
    path = " ".join(f"{'L' if at else 'M'}{across.to(p.x):.1f} {up.to(p.y):.1f}" for at, p in enumerate(points))
    drawn = [_axes(across, up, x_words, y_words), *_marks(marks, across), f'<path class="line" d="{path}"/>']
    drawn += (
        f'<circle class="point" cx="{across.to(point.x):.1f}" cy="{up.to(point.y):.1f}" r="3">'
        f"<title>{escape(point.words)}</title></circle>"
        for point in points
    )
    return _svg(HEIGHT, drawn)


def timeline(rows: Sequence[tuple[str, Sequence[Span]]], x_words: Callable[[float], str]) -> str:
    """What went on when: a row for each name."""
    spans = [span for _, row in rows for span in row]
    across = _Scale.of([moment for span in spans for moment in (span.begin, span.end)], LEFT, WIDTH - RIGHT)
    height = TOP + 22 * len(rows) + BOTTOM
    drawn = []
    for at, (name, row) in enumerate(rows):
        top = TOP + 22 * at
        drawn.append(f'<text class="axis" x="{LEFT - 6}" y="{top + 13}" text-anchor="end">{escape(name)}</text>')
        for span in row:
            begin, end = across.to(span.begin), across.to(span.end)
            drawn.append(
                f'<rect class="{span.style}" x="{begin:.1f}" y="{top + 2}" width="{max(2.0, end - begin):.1f}" height="14">'
                f"<title>{escape(span.words)}</title></rect>"
            )
    drawn += _ends(across, x_words, height)
    return _svg(height, drawn)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of them, evenly chosen, the last one in any case."""
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return list(reversed(list(reversed(points))[::step]))


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places on the picture."""

    low: float
    high: float
    begin: float
    end: float

    @staticmethod
    def of(values: Sequence[float], begin: float, end: float) -> _Scale:
        low, high = min(values, default=0.0), max(values, default=0.0)
        return _Scale(low, high if high / 2 > low / 2 else low + max(1.0, abs(low) * 1e-9), begin, end)

    def to(self, value: float) -> float:
        """Halves, for the difference of two floats may be more than a float holds."""
        return self.begin + (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2) * (self.end - self.begin)

    def at(self, share: float) -> float:
        """The value at a part of the way, from 0 to 1."""
        return (1 - share) * self.low + share * self.high


def _axes(across: _Scale, up: _Scale, x_words: Callable[[float], str], y_words: Callable[[float], str]) -> str:
    drawn = []
    for share in (0.0, 0.5, 1.0):
        value = up.at(share)
        y = up.to(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(
            f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(y_words(value))}</text>'
        )
    return "".join([*drawn, *_ends(across, x_words, HEIGHT)])


def _ends(across: _Scale, x_words: Callable[[float], str], height: float) -> Iterator[str]:
    for value, x, anchor in ((across.low, LEFT, "start"), (across.high, WIDTH - RIGHT, "end")):
        words = escape(x_words(value))
        yield f'<text class="axis" x="{x}" y="{height - 6}" text-anchor="{anchor}">{words}</text>'


def _marks(marks: Sequence[Mark], across: _Scale) -> Iterator[str]:
    for mark in marks:
        x = across.to(mark.x)
        yield (
            f'<line class="{mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(mark.words)}</title></line>"
        )


def _svg(height: float, drawn: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(drawn)}</svg>'
