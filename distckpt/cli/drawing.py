"""The picture that ``distckpt plot`` makes. Imports matplotlib, so only who wants one imports this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from distckpt.cli.text import duration
from distckpt.directory.picture import Picture
from distckpt.format.json.stats import Durations, RunStats
from distckpt.terminal.sizes import counted, human_bytes

MOST_METRICS = 6
"""Panels of metrics; the first by name."""

LATEST = 4e9
"""Epoch seconds beyond which no host's clock is believed."""

ENDS = {"closed": "#12876f", "failed": "#b3261e", "crashed": "#b3261e", "open": "#1f6fb2"}
STALL, COMMIT, SIZE, METRIC, MARK = "#d9822b", "#1f6fb2", "#5b5f97", "#12876f", "#b3261e"


def draw(picture: Picture) -> Any:
    """A figure: runs and what saves took over time, sizes and metrics over checkpoint numbers."""
    metrics = dict(list(picture.metrics.items())[:MOST_METRICS])
    runs = [run for run in picture.history.runs if 0 < run.began < LATEST and run.seconds < LATEST]
    panels: list[tuple[float, Callable[[Any], None], str]] = []
    if runs:
        panels.append((0.8, lambda axes: _runs(axes, picture, runs), "time"))
        if any(run.saves for run in runs):
            panels.append((1.4, lambda axes: _spans(axes, runs), "time"))
    if picture.checkpoints:
        panels.append((1.2, lambda axes: _sizes(axes, picture), "step"))
    for name, points in metrics.items():
        panels.append((1.2, partial(_metric, name=name, points=points), "step"))
    figure = Figure(figsize=(10, 1.1 + 1.5 * sum(share for share, _, _ in panels)), dpi=120, layout="constrained")
    figure.suptitle(_title(picture), fontsize=11, x=0.01, ha="left")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[share for share, _, _ in panels])
    first: dict[str, Any] = {}
    for place, (_, fill, over) in enumerate(panels):
        axes = figure.add_subplot(grid[place], sharex=first.get(over))
        first.setdefault(over, axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        fill(axes)
        is_last = place + 1 == len(panels) or panels[place + 1][2] != over
        axes.tick_params(labelbottom=is_last)
        if over == "step":
            _mark(axes, picture, with_words=first["step"] is axes)
            if is_last:
                axes.set_xlabel("checkpoint number")
    if "time" in first:
        locator: Any = AutoDateLocator()  # type: ignore[no-untyped-call]
        first["time"].xaxis.set_major_locator(locator)
        first["time"].xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    if "step" in first:
        first["step"].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _title(picture: Picture) -> str:
    parts = [picture.directory, counted(len(picture.checkpoints), "checkpoint")]
    if picture.history.runs:
        failures = picture.history.failures.count
        parts.append(f"{counted(len(picture.history.runs), 'run')}, {counted(failures, 'failure')}")
        parts.append(f"goodput {100 * picture.history.goodput.fraction:.1f} %")
    return "   ".join(parts).replace("$", r"\$")


# ---- over time ------------------------------------------------------------------------------------------------------


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds)


def _runs(axes: Any, picture: Picture, runs: list[RunStats]) -> None:
    """A bar for each run with its world size where that changes; crosses where it ended badly; a tick for each commit."""
    size = 0
    for run in runs:
        state, begin, end = picture.history.state(run), _moment(run.began), _moment(run.began + run.seconds)
        axes.plot([begin, end], [0, 0], color=ENDS[state], lw=12, solid_capstyle="butt", alpha=0.85)
        if run.world_size != size:
            axes.annotate(
                counted(run.world_size, "rank"),
                (begin, 0),
                (0, 11),
                textcoords="offset points",
                fontsize=8,
                va="bottom",
            )
        size = run.world_size
    commits = [_moment(one.time) for one in picture.checkpoints if 0 < one.time < LATEST]
    axes.plot(commits, [-0.6] * len(commits), "|", color="#444444", ms=7, label="checkpoints that are there")
    ends = [_moment(crash.time) for crash in picture.crashes if 0 < crash.time < LATEST]
    axes.plot(ends, [0] * len(ends), "x", color=MARK, ms=9, mew=2.2, label="crashes" if ends else None)
    axes.set_ylim(-1, 1.3)
    axes.set_yticks([0], ["runs"])
    axes.grid(visible=False)
    axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False, borderaxespad=0)


def _spans(axes: Any, runs: list[RunStats]) -> None:
    """Of each run how long training stood still for a save and until a save was committed: the mean, the longest, and a
    dot for each of the last saves.
    """
    told = False
    for what, color, pick in (("stall", STALL, _stall), ("committed after", COMMIT, lambda run: run.committed)):
        label = what
        for run in runs:
            durations: Durations = pick(run)
            if not durations.times or durations.mean <= 0:
                continue
            begin, end = _moment(run.began), _moment(run.began + run.seconds)
            axes.plot([begin, end], [durations.mean] * 2, color=color, lw=2.4, label=label, solid_capstyle="round")
            axes.fill_between(
                [begin, end], [durations.mean] * 2, [durations.longest] * 2, color=color, alpha=0.15, lw=0
            )
            label, told = "", True
            each = [(run.began + took.at, took.stall if pick is _stall else took.committed) for took in run.recent]
            axes.plot([_moment(at) for at, _ in each], [took for _, took in each], ".", color=color, ms=3)
    if not told:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, 8 * high)  # for the legend
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("each save:\nmean to longest")
    axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)


def _stall(run: RunStats) -> Durations:
    return run.stall if run.stall.times else run.first_stall


# ---- over checkpoint numbers ----------------------------------------------------------------------------------------


def _sizes(axes: Any, picture: Picture) -> None:
    numbers = [one.number for one in picture.checkpoints]
    sizes = [one.nbytes for one in picture.checkpoints]
    axes.vlines(numbers, 0, sizes, color=SIZE, lw=1.2, alpha=0.5)
    axes.plot(numbers, sizes, "o", color=SIZE, ms=4)
    most = max(1, *sizes)
    axes.set_ylim(0, 1.35 * most)
    unit = 1024.0 ** int(math.log(most, 1024))
    axes.yaxis.set_major_locator(
        FixedLocator([unit * mark for mark in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, most / unit)])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: human_bytes(int(nbytes))))
    axes.set_ylabel("size")


def _metric(axes: Any, name: str, points: Iterable[tuple[int, float]]) -> None:
    numbers, values = zip(*points, strict=True)
    axes.plot(numbers, values, "-o", color=METRIC, lw=1.3, ms=4)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(y=0.15)
    shown = name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}"
    axes.set_ylabel(shown.replace("$", r"\$"))


def _mark(axes: Any, picture: Picture, with_words: bool) -> None:
    """Crashes and changes of the world size, where they came between checkpoints."""
    for after in sorted({crash.after for crash in picture.crashes if crash.after is not None}):
        axes.axvline(after, color=MARK, lw=1.1, ls=":")
        if with_words:
            _word(axes, after, "crash", MARK, 1.0)
    for number, before, now in picture.resizes:
        axes.axvline(number, color="#444444", lw=1.0, ls="--", alpha=0.6)
        if with_words:
            _word(axes, number, f"{before} to {now} ranks", "#444444", 0.88)


def _word(axes: Any, number: int, word: str, color: str, height: float) -> None:
    place = axes.get_xaxis_transform()
    axes.annotate(
        word, (number, height), (3, -2), xycoords=place, textcoords="offset points", color=color, fontsize=8, va="top"
    )
