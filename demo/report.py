"""The end of the demo: a table, the checks, and a picture."""

from __future__ import annotations

from pathlib import Path

from checks import Check, Reading
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import Commit, Record
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

TWO, THREE, EVALUATION, CRASH = "#1f6fb2", "#12876f", "#d9822b", "#b3261e"


def print_table(console: Console, record: Record, whole: dict[str, Reading], partial: dict[str, Reading]) -> None:
    """A row for each checkpoint that was committed; ``whole`` are those still there, ``partial`` what was evaluated."""
    table = Table(
        title="Committed checkpoints", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("checkpoint")
    for name in ("ranks", "size", "stall", "commit", "evaluation loss"):
        table.add_column(name, justify="right")
    table.add_column("now")
    table.add_column("bit for bit the same")
    for commit in record.commits:
        evaluation = record.evaluation(commit)
        table.add_row(
            commit.name,
            str(commit.world_size),
            f"{commit.nbytes / 1e6:.1f} MB",
            f"{1e3 * commit.stall:.0f} ms",
            f"{1e3 * commit.decided:.0f} ms",
            f"{evaluation['loss']:.4f}" if evaluation else "passed over",
            "kept" if commit.path in whole else "retired",
            _comparison(whole.get(commit.path), partial[commit.path]),
        )
    console.print(table)
    console.print(
        "stall: training stood still, slowest rank; the first save of a run also plans who writes what.\n"
        "commit: from the call of save until rank 0 knew the checkpoint to be durable and visible.",
        style="dim",
    )


def _comparison(whole: Reading | None, partial: Reading) -> Text:
    reading, what = (whole, "all tensors") if whole is not None else (partial, "the model")
    if not reading.compared:
        return Text("not read before it was retired", style="dim")
    if reading.differing:
        return Text(f"NO: {len(reading.differing)} of {reading.compared} tensors differ", style="bold red")
    return Text(f"yes, {what} ({reading.compared})", style="green")


def print_checks(console: Console, checks: list[Check]) -> None:
    """Every claim with what was found."""
    console.print("\n[bold]Checked[/bold]")
    for check in checks:
        mark = Text("  holds   ", style="green") if check.holds else Text("  FAILED  ", style="bold red")
        console.print(mark, Text(check.claim), Text(f"\n            {check.found}", style="dim"), sep="")


def draw(record: Record, crash: int, resumed: Commit, path: Path) -> None:
    """Training and evaluation loss over steps, with the crash and who trained what, as a PNG."""
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    last = max(event["step"] for event in record.steps)
    _shade(axes, crash, resumed, last)
    two, three = _losses(record, 2), _losses(record, 3)
    axes.plot(*two, color=TWO, lw=1.7, label="training on 2 ranks")
    again = [step for step in two[0] if step > resumed.number]
    axes.plot(again, two[1][-len(again) :], color=TWO, lw=7, alpha=0.3, solid_capstyle="round")
    axes.plot(*three, color=THREE, lw=1.7, label="training on 3 ranks")
    numbers = [commit.number for commit in record.commits if record.evaluation(commit)]
    found = [evaluation["loss"] for commit in record.commits if (evaluation := record.evaluation(commit))]
    axes.plot(numbers, found, "o", color=EVALUATION, ms=8, mec="white", mew=1.2, zorder=5, label="evaluation, held out")
    highest = max(event["loss"] for event in record.steps)
    axes.set(xlabel="step", ylabel="loss, nats a byte", xlim=(0, last + 1), ylim=(1.5, highest + 0.2))
    _mark_crash(axes, crash, resumed)
    axes.grid(axis="y", color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=True, framealpha=1, edgecolor="#dddddd")
    axes.set_title("A rank is killed while it saves; training goes on with another number of ranks", loc="left", pad=12)
    figure.savefig(path)


def _losses(record: Record, world_size: int) -> tuple[list[int], list[float]]:
    """Steps and losses of the run on that many ranks."""
    events = [event for event in record.steps if event["world_size"] == world_size]
    return [event["step"] for event in events], [event["loss"] for event in events]


def _shade(axes: Axes, crash: int, resumed: Commit, last: int) -> None:
    axes.axvspan(0, resumed.number, color=TWO, alpha=0.08, lw=0)
    axes.axvspan(resumed.number, crash, facecolor="#f4e3c8", alpha=0.6, lw=0)
    axes.axvspan(crash, last + 1, color=THREE, alpha=0.08, lw=0)
    _caption(axes, resumed.number / 2, "2 ranks", TWO)
    _caption(axes, (resumed.number + crash) / 2, "lost,\nthen trained\nagain", "#8a6a2f")
    _caption(axes, (crash + last) / 2, "3 ranks", THREE)


def _caption(axes: Axes, step: float, text: str, color: str) -> None:
    """At the foot of the picture."""
    across = axes.get_xaxis_transform()
    axes.text(step, 0.025, text, color=color, transform=across, ha="center", va="bottom", linespacing=1.25)


def _mark_crash(axes: Axes, crash: int, resumed: Commit) -> None:
    axes.axvline(crash, color=CRASH, lw=1.6)
    top = axes.get_ylim()[1]
    axes.annotate(
        f"rank 1 killed\nwhile saving ckpt-{crash}",
        (crash, top),
        (6, -4),
        textcoords="offset points",
        va="top",
        color=CRASH,
    )
    height = top - 0.2 * (top - axes.get_ylim()[0])
    axes.annotate("", (resumed.number, height), (crash, height), arrowprops={"arrowstyle": "-|>", "color": CRASH})
    axes.annotate(
        f"resumed from\n{resumed.name}",
        (resumed.number, height),
        (-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=CRASH,
    )
