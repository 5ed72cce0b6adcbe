"""The page: what was gathered, in words, figures and pictures. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from distckpt.cli import text
from distckpt.cli.listing import Listed
from distckpt.cli.overview.charts import Mark, Point, Span, line_chart, timeline
from distckpt.cli.overview.gather import MOST_LOOKED_FOR, Overview
from distckpt.directory.goodput import History
from distckpt.directory.laggards import laggards_of
from distckpt.format import names
from distckpt.format.json.group import Item
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.stats import RunStats, SaveTook
from distckpt.terminal.sizes import counted, human_bytes

MOST_ROWS = 100
"""Of a table, the newest."""

MOST_RUNS = 40
"""Rows of the picture of runs, the newest."""

Charts = list[tuple[str, Markup]]


@dataclass(frozen=True, slots=True)
class Row:
    """Cells with their columns' names; ``style`` is for all of it."""

    cells: tuple[tuple[str, str], ...]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """``left_out`` says how many rows came before these, '' for none."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    right: frozenset[str] = frozenset()
    left_out: str = ""


def page(overview: Overview, refresh: int = 0) -> str:
    """One HTML file without scripts, which needs nothing else.

    A browser asks for it again every ``refresh`` seconds; 0: never.
    """
    return _template().render(
        directory=overview.picture.directory,
        read_at=text.local_time(overview.read_at),
        ended=overview.ended,
        refresh=refresh,
        figures=list(_figures(overview)),
        wrong=overview.wrong,
        looked_for=MOST_LOOKED_FOR,
        pictures=[
            ("Runs", _runs_chart(overview)),
            ("Checkpoints", _checkpoint_charts(overview)),
            ("Metrics", _metric_charts(overview)),
            ("What saving costs", _cost_charts(overview)),
        ],
        tables=[
            _costs(overview),
            _laggards(overview),
            _ranks(overview),
            _retention(overview),
            _checkpoints(overview),
            _groups(overview),
            _held(overview),
            _leases(overview),
            _runs(overview),
        ],
    )


@functools.cache
def _template() -> jinja2.Template:
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)


# ---- figures ------------------------------------------------------------------------------------------------------


def _figures(overview: Overview) -> Iterator[tuple[str, str]]:
    history, kept = overview.picture.history, overview.picture.checkpoints
    newest = next((one for one in reversed(overview.listed) if "newest" in one.marks), None)
    yield "newest checkpoint", newest.name if newest is not None else "none"
    if newest is not None:
        yield "since it was saved", text.duration(max(0.0, overview.read_at - newest.record.time))
    yield "checkpoints", f"{len(kept):,}"
    yield "in all of them", human_bytes(sum(record.nbytes for record in kept))
    if history.runs:
        yield "goodput", f"{100 * history.goodput.fraction:.1f} %"
        yield "runs, and failures", f"{len(history.runs):,}, {history.failures.count:,}"
        stall, committed = history.all(lambda run: run.stall), history.all(lambda run: run.committed)
        if stall.times:
            yield "training stood still for a save", text.duration(stall.mean)
        if committed.times:
            yield "until it was committed", text.duration(committed.mean)


# ---- pictures -----------------------------------------------------------------------------------------------------


def _runs_chart(overview: Overview) -> Charts:
    history = overview.picture.history
    runs = history.runs[-MOST_RUNS:]
    rows = [(f"run {run.run}", [Span(run.began, run.began + run.seconds, _of_run(history, run), history.state(run))])
            for run in runs]  # fmt: skip
    words = "from the first sign of life of each to its last: green ended in good order, red did not, blue goes on"
    return [(words, Markup(timeline(rows, text.local_time)))] if rows else []


def _of_run(history: History, run: RunStats) -> str:
    ranks = counted(run.world_size, "rank")
    return f"run {run.run}, {history.state(run)}: {ranks}, {text.duration(run.seconds)}, {counted(run.saves, 'save')}"


def _checkpoint_charts(overview: Overview) -> Charts:
    """By the time of their saves."""
    records = sorted((one.record for one in overview.listed if "retiring" not in one.marks), key=lambda one: one.time)
    if len(records) < 2:
        return []
    resized = [
        Mark(after.time, f"from {before.world_size} to {counted(after.world_size, 'rank')}", "resized")
        for before, after in itertools.pairwise(records)
        if before.world_size != after.world_size
    ]
    crashes = [
        Mark(crash.time, f"run {crash.run} came to no good end", "crash")
        for crash in overview.picture.crashes
        if records[0].time <= crash.time <= records[-1].time
    ]
    numbers = [Point(one.time, one.number, f"{_name(one)}, {text.local_time(one.time)}") for one in records]
    sizes = [Point(one.time, one.nbytes, f"{_name(one)}: {human_bytes(one.nbytes)}") for one in records]
    marks = [*resized, *crashes]
    said = " (red: a run failed; amber: another number of ranks)" if marks else ""
    return [
        (f"numbers, by when they were saved{said}", Markup(line_chart(numbers, text.local_time, _plain, marks))),
        ("sizes", Markup(line_chart(sizes, text.local_time, lambda nbytes: human_bytes(int(nbytes))))),
    ]


def _metric_charts(overview: Overview) -> Charts:
    charts: Charts = []
    for name, pairs in overview.picture.metrics.items():
        points = [Point(number, value, f"{number}: {name} {value:.6g}") for number, value in pairs]
        charts.append((f"{name}, by number", Markup(line_chart(points, _plain, _plain))))
    return charts


def _cost_charts(overview: Overview) -> Charts:
    return [*_save_charts(overview), *_run_charts(overview)]


def _save_charts(overview: Overview) -> Charts:
    """Without the first save of a run, which plans and touches memory: others would be a flat line below its stall."""
    saves = [(run, took) for run in overview.picture.history.runs for took in _later_saves(run)]
    if len(saves) < 2:
        return []
    kinds: list[tuple[str, Callable[[SaveTook], float]]] = [
        ("training stood still", lambda took: took.stall),
        ("committed after", lambda took: took.committed),
    ]
    charts: Charts = []
    for words, pick in kinds:
        points = [
            Point(run.began + took.at, pick(took), f"{took.number} of run {run.run}: {text.duration(pick(took))}")
            for run, took in saves
        ]
        title = f"{words}: the last saves of each run but its first, by when they began"
        charts.append((title, Markup(line_chart(points, text.local_time, text.duration))))
    return charts


def _later_saves(run: RunStats) -> Sequence[SaveTook]:
    has_first = len(run.recent) == run.committed.times and not run.failed
    return run.recent[1:] if has_first else run.recent


def _run_charts(overview: Overview) -> Charts:
    runs = [run for run in overview.picture.history.runs if run.saves]
    if len(runs) < 2:
        return []
    stalls = [Point(run.run, _stall(run), f"run {run.run}: {text.duration(_stall(run))}") for run in runs]
    commits = [
        Point(run.run, run.committed.mean, f"run {run.run}: {text.duration(run.committed.mean)}")
        for run in runs
        if run.committed.times
    ]
    return [
        ("training stood still for a save, on average, by run", Markup(line_chart(stalls, _plain, text.duration))),
        ("from a save to its commit, on average, by run", Markup(line_chart(commits, _plain, text.duration))),
    ]


def _stall(run: RunStats) -> float:
    return run.stall.mean if run.stall.times else run.first_stall.mean


def _plain(number: float) -> str:
    return f"{number:.5g}" if number != int(number) else f"{int(number):,}"


# ---- tables -------------------------------------------------------------------------------------------------------


def _table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str], *right: str
) -> Table:
    """The newest of the rows, which come oldest first, newest first."""
    shown = list(zip(rows, styles, strict=True))[::-1][:MOST_ROWS]
    left_out = f"{len(rows) - MOST_ROWS:,}" if len(rows) > MOST_ROWS else ""
    made = tuple(Row(tuple(zip(columns, cells, strict=True)), style) for cells, style in shown)
    return Table(title, tuple(columns), made, frozenset(right), left_out)


def _checkpoints(overview: Overview) -> Table:
    metrics = sorted({name for one in overview.listed for name in one.record.metrics})
    columns = ["checkpoint", "state", "saved", "size", "ranks", *metrics]
    rows = [
        [
            one.name,
            ", ".join(one.marks),
            text.local_time(one.record.time),
            human_bytes(one.record.nbytes),
            str(one.record.world_size),
            *(f"{one.record.metrics[name]:.5g}" if name in one.record.metrics else "" for name in metrics),
        ]
        for one in overview.listed
    ]
    styles = [_style(one) for one in overview.listed]
    return _table("All checkpoints", columns, rows, styles, "size", "ranks", *metrics)


def _style(one: Listed) -> str:
    return one.marks[0] if one.marks else ""


_PHASES = (
    ("training stood still, for the first save", "first_stall"),
    ("training stood still", "stall"),
    ("of that, for the save before", "queued"),
    ("of that, to copy", "copied"),
    ("a GPU's step waited for the copy", "device_waited"),
    ("until rank 0's part was on storage", "written"),
    ("until it was committed", "committed"),
    ("training waited for saves to end", "waited"),
    ("a restore took", "restored"),
)
"""What takes time, and where RunStats has how long."""


def _costs(overview: Overview) -> Table:
    """Of the newest run that has measured something."""
    measured = [run for run in overview.picture.history.runs if run.saves or run.restored.times]
    if not measured:
        return _table("What saves and restores took", [], [], [])
    run = measured[-1]
    taken = [(words, getattr(run, field)) for words, field in _PHASES]
    rows = [
        [words, f"{each.times:,}", text.duration(each.mean), text.duration(each.longest), text.duration(each.total)]
        for words, each in taken
        if each.times
    ]
    columns = ["", "times", "on average", "the longest", "in all"]
    title = f"What saves and restores took in run {run.run}, on rank 0"
    return _table(title, columns, rows[::-1], [""] * len(rows), *columns[1:])


def _laggards(overview: Overview) -> Table:
    found = laggards_of(overview.picture.history.runs)
    if found is None:
        return _table("Who landed last", [], [], [])
    rows = [
        [f"{one.rank}", f"{one.lag.times:,}", text.duration(one.lag.mean), text.duration(one.lag.longest)]
        for one in found.ranks
    ]
    columns = ["rank", "times", "behind the first, on average", "at most"]
    title = f"Whose shards landed last, in the last {counted(found.saves, 'save')} of run {found.run}"
    return _table(title, columns, rows[::-1], [""] * len(rows), *columns)


def _ranks(overview: Overview) -> Table:
    """Who writes most is who is waited for, where all write equally fast."""
    manifest = overview.newest
    if manifest is None or manifest.world_size == 1:
        return _table("What each rank wrote", [], [], [])
    nbytes, shards = [0] * manifest.world_size, [0] * manifest.world_size
    for shard in manifest.shards:
        nbytes[shard.rank] += shard.size
        shards[shard.rank] += 1
    mean = sum(nbytes) / len(nbytes)
    by_size = sorted(range(manifest.world_size), key=lambda rank: (nbytes[rank], -rank))
    rows = [
        [str(rank), str(shards[rank]), human_bytes(nbytes[rank]), f"{nbytes[rank] / mean:.2f}" if mean else ""]
        for rank in by_size
    ]
    columns = ["rank", "shards", "size", "times the mean"]
    title = f"What each rank wrote of {names.checkpoint_folder(manifest.name, manifest.number)}, the most first"
    return _table(title, columns, rows, [""] * len(rows), *columns)


def _retention(overview: Overview) -> Table:
    columns = ["state", "checkpoints", "size", "oldest", "newest"]
    rows = []
    for marks, words in _KEPT:
        records = [one.record for one in overview.listed if marks & {*one.marks}]
        if records:
            times = [record.time for record in records]
            size = human_bytes(sum(record.nbytes for record in records))
            ends = text.local_time(min(times)), text.local_time(max(times))
            rows.append([words, f"{len(records):,}", size, *ends])
    return _table("Retention", columns, rows[::-1], [""] * len(rows), "checkpoints", "size")


_KEPT = (
    ({"newest", "active"}, "active: taking part in retention"),
    ({"preserved"}, "preserved for good"),
    ({"pinned"}, "of these, pinned"),
    ({"leased"}, "of these, being read"),
    ({"retiring"}, "retiring: being deleted"),
    ({"missing"}, "missing: deleted by others"),
)
"""The marks of Listed, and what they mean for whether it stays."""


def _groups(overview: Overview) -> Table:
    numbers = ("done", "working", "waiting", "given back", "set aside", "skipped", "missed")
    rows = []
    for one in overview.groups:
        state = one.state
        counts = (state.acknowledged, len(state.claims), len(one.unseen), len(state.returned),
                  len(state.set_aside) + state.forgotten, state.skipped, state.missed)  # fmt: skip
        rows.append([one.name, state.mode, *(f"{count:,}" for count in counts), text.local_time(one.entry.time)])
    columns = ["group", "mode", *numbers, "last sign"]
    return _table("Groups of readers", columns, rows[::-1], [""] * len(rows), *numbers)


def _held(overview: Overview) -> Table:
    rows: list[list[str]] = []
    for one in overview.groups:
        state = one.state
        rows += ([one.name, _name(each), f"at {each.worker}", str(each.delivery), ""] for each in state.claims)
        rows += ([one.name, _name(each), "given back", str(each.deliveries), each.error] for each in state.returned)
        rows += ([one.name, _name(each), "set aside", str(each.deliveries), each.error] for each in state.set_aside)
    columns = ["group", "checkpoint", "how it stands", "deliveries", "error"]
    return _table("What groups have, and what failed", columns, rows, [""] * len(rows), "deliveries")


def _leases(overview: Overview) -> Table:
    by_attempt = {one.record.attempt: one.name for one in overview.listed}
    rows = [[by_attempt.get(one.attempt, one.attempt), one.holder, _lasts(one)] for one in overview.leases]
    return _table("Leases and pins", ["checkpoint", "holder", "until"], rows, [""] * len(rows))


def _lasts(lease: Lease) -> str:
    if lease.seconds is None:
        return text.pin_in_words(lease)
    return f"it has not been renewed for {text.duration(lease.seconds)}"


def _runs(overview: Overview) -> Table:
    history = overview.picture.history
    rows = [
        [
            str(run.run),
            text.local_time(run.began),
            text.duration(run.seconds),
            history.state(run),
            str(run.world_size),
            run.host,
            f"{run.saves:,}",
            f"{run.failed:,}",
            text.duration(_stall(run)) if run.saves else "",
            text.duration(run.committed.mean) if run.committed.times else "",
            text.duration(history.lost(run)) if history.lost(run) else "",
        ]
        for run in history.runs
    ]
    numbers = ("run", "ran for", "ranks", "saves", "failed", "stall", "commit", "lost")
    columns = ["run", "began", "ran for", "end", "ranks", "rank 0 on", "saves", "failed", "stall", "commit", "lost"]
    return _table("Runs", columns, rows, [history.state(run) for run in history.runs], *numbers)


def _name(one: CheckpointRecord | Item) -> str:
    return names.checkpoint_folder(one.name, one.number)
