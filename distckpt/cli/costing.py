"""``distckpt stats``: what checkpoints and failures have cost a job, and how often it had better save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory.goodput import CONFIDENCE, Failures, Goodput, History, Interval
from distckpt.directory.laggards import Laggards, laggards_of
from distckpt.directory.stats import Told, read_stats
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError
from distckpt.format.json.stats import Durations, RunStats, SaveTook
from distckpt.storage import open_store
from distckpt.terminal.sizes import counted, human_bytes

MOST_RUNS = 12
"""Shown to people; --json shows all."""

MOST_LAGGARDS = 5
"""As above."""

_STYLES = {"closed": "green", "failed": "bold red", "crashed": "bold red", "open": "bold"}


@click.command("stats")
@click.argument("directory", metavar="DIR")
@options.as_json
@options.storage_options
def show_stats(directory: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Show what saves and failures have cost the job of a directory: runs, goodput, stalls, and the interval to save at.

    Goodput is productive time over all time from the first start to the last sign of life. A run tells of itself after
    5 seconds, from time to time then, and when it ends.
    """
    store = open_store(directory, storage_options)
    told = read_stats(store)
    if not told.history.runs:
        read_run(store)  # which says so if the log is gone
        raise CheckpointNotFoundError(store.url, _nothing(told))
    if as_json:
        text.print_json({"directory": store.url, **_as_json(told)})
    else:
        _print(told)


def _nothing(told: Told) -> str:
    why = f", but for what cannot be read: {'; '.join(told.passed_over)}" if told.passed_over else ""
    return f"no run has told here what it has measured{why}"


# ---- for programs -------------------------------------------------------------------------------------------------


def _as_json(told: Told) -> dict[str, Any]:
    history = told.history
    goodput, interval, failures = history.goodput, history.interval, history.failures
    seconds: dict[str, Any] = msgspec.to_builtins(goodput)
    return {
        "goodput": goodput.fraction,
        "seconds": {"wall": goodput.wall, **seconds},
        "failures": {
            "count": failures.count,
            "running_seconds": failures.seconds,
            "mean_time_between": failures.mean_time_between,
            "bounds": [_finite(bound) for bound in failures.bounds],
        },
        "interval": None if interval is None else _interval_as_json(history, interval),
        "runs": [_run_as_json(history, run) for run in history.runs],
        "silent_runs": history.silent,
        "passed_over": list(told.passed_over),
    }


def _run_as_json(history: History, run: RunStats) -> dict[str, Any]:
    told = {name: value for name, value in msgspec.structs.asdict(run).items() if name != "format"}
    durations = {
        name: {"times": value.times, "total": value.total, "longest": value.longest, "mean": value.mean}
        for name, value in told.items()
        if isinstance(value, Durations)
    }
    recent = [{name: getattr(took, name) for name in SaveTook.__annotations__} for took in run.recent]
    return {**told, **durations, "recent": recent, "state": history.state(run), "lost_to_failures": history.lost(run)}


def _interval_as_json(history: History, interval: Interval) -> dict[str, Any]:
    return {
        "seconds": interval.best,
        "bounds": [interval.least, _finite(interval.most)],
        "confidence": CONFIDENCE,
        "cost": interval.cost,
        "latency": interval.latency,
        "now": history.all(lambda run: run.between).mean or None,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


# ---- for people ---------------------------------------------------------------------------------------------------


def _print(told: Told) -> None:
    history, console = told.history, text.console()
    headline = Text(f"goodput {100 * history.goodput.fraction:.2f} %", style="bold")
    since = f" of {text.duration(history.goodput.wall)}, from the first start to the last sign of life"
    console.print(Text.assemble(headline, since), soft_wrap=True)
    console.print()
    console.print(_runs(history))
    for line in _omissions(told):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_times(history.goodput))
    if costs := list(_costs(history)):
        console.print()
        table = Table(["for each save", "mean", "longest", "times"], right=["mean", "longest", "times"])
        for name, durations in costs:
            table.add_row(name, _span(durations.mean), _span(durations.longest), f"{durations.times:,}")
        console.print(table)
    if (late := laggards_of(history.runs)) is not None:
        console.print()
        console.print(_laggards(late))
    console.print()
    for line in _sentences(history):
        console.print(line, soft_wrap=True)


def _runs(history: History) -> Table:
    right = ["run", "ran for", "saves", "stall", "lost"]
    table = Table(
        ["began", "run", "ran for", "end", "saves", "stall", "lost"],
        right=right,
        least=["saves", "run", "stall", "lost", "ran for"],
    )
    for run in history.runs[-MOST_RUNS:]:
        state, lost = history.state(run), history.lost(run)
        table.add_row(
            text.local_time(run.began),
            str(run.run),
            text.duration(run.seconds),
            Text(state, style=_STYLES[state]),
            f"{run.saves:,}",
            _span(run.stall.mean if run.stall.times else run.first_stall.mean) if run.saves else "",
            _span(lost) if lost else "",
        )
    return table


def _omissions(told: Told) -> Iterator[str]:
    history = told.history
    if len(history.runs) > MOST_RUNS:
        yield f"and {counted(len(history.runs) - MOST_RUNS, 'earlier run')}; --json shows them all"
    if history.silent:
        yield f"{counted(history.silent, 'run')} between these ended without a word, and counted as failed"
    for reason in told.passed_over:
        yield f"passed over: {reason}"


def _times(goodput: Goodput) -> Table:
    table = Table(["where the time went", "time", "share"], right=["time", "share"])
    words = {
        "productive": "training that was kept",
        "saving": "stood still for saves",
        "restoring": "restores",
        "starting": "before the first restore",
        "lost": "training lost to failures",
        "down": "down after failures",
        "paused": "between a good end and the next start",
    }
    for name, what in words.items():
        seconds = getattr(goodput, name)
        if seconds or name in ("productive", "saving", "lost"):
            table.add_row(what, _span(seconds), f"{100 * seconds / (goodput.wall or 1.0):.2f} %")
    return table


def _costs(history: History) -> Iterator[tuple[str, Durations]]:
    found = {
        "training stood still": history.all(lambda run: run.stall),
        "  the first save of a run": history.all(lambda run: run.first_stall),
        "  of that, for the save before": history.all(lambda run: run.queued),
        "  of that, copying": history.all(lambda run: run.copied),
        "the GPU's next step waited": history.all(lambda run: run.device_waited),
        "training waited for its end": history.all(lambda run: run.waited),
        "written after": history.all(lambda run: run.written),
        "committed after": history.all(lambda run: run.committed),
        "from one save to the next": history.all(lambda run: run.between),
    }
    return ((name, durations) for name, durations in found.items() if durations.times)


def _laggards(found: Laggards) -> Table:
    """The first of them."""
    head = f"landed last in run {found.run}"
    table = Table([head, "times", "mean lag", "longest"], right=["times", "mean lag", "longest"])
    for one in found.ranks[:MOST_LAGGARDS]:
        share = f"{one.lag.times:,} of {found.saves:,}"
        table.add_row(f"rank {one.rank}", share, _span(one.lag.mean), _span(one.lag.longest))
    return table


def _sentences(history: History) -> Iterator[str]:
    runs = history.runs
    saves, committed = sum(run.saves for run in runs), history.all(lambda run: run.committed).times
    nbytes = sum(run.bytes_committed for run in runs)
    yield (
        f"{counted(saves, 'save')} begun, {committed:,} committed, {sum(run.failed for run in runs):,} failed; "
        f"{human_bytes(nbytes)} in checkpoints, of which rank 0 wrote {human_bytes(sum(run.bytes_written for run in runs))}"
    )
    yield _of_failures(history.failures)
    yield _of_interval(history.interval)
    if (between := history.all(lambda run: run.between)).times and history.interval is not None:
        yield f"so far it was saved every {text.duration(between.mean)}"


def _of_failures(failures: Failures) -> str:
    if not failures.count:
        return f"no failures seen in {text.duration(failures.seconds)} of running"
    low, high = failures.bounds
    return (
        f"{counted(failures.count, 'failure')} in {text.duration(failures.seconds)} of running: one every "
        f"{text.duration(low)} to {text.duration(high)}, with {CONFIDENCE:.0%} confidence"
    )


def _of_interval(interval: Interval | None) -> str:
    if interval is None:
        return "no save has been committed, so there is nothing to say about how often to save"
    cost = f"a save costs {_span(interval.cost)} of training"
    if math.isinf(interval.most):
        return f"{cost}: there is no reason to save more often than every {text.duration(interval.least)}"
    bounds = f"{text.duration(interval.least)} to {text.duration(interval.most)}"
    if interval.best is None:
        return f"{cost}: save every {bounds} (Daly 2006); the failures are too few to say it better"
    return f"{cost}: save every {text.duration(interval.best)}, within {bounds} (Daly 2006)"


def _span(seconds: float) -> str:
    return "0 s" if seconds == 0 else text.duration(seconds)
