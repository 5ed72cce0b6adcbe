"""The arithmetic of costs: it makes sense for whatever was measured, and says no more than that."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.directory.goodput import MANY, Failures, History, daly, suggested, young
from distckpt.format.json.stats import FORMAT, Durations, RunStats

seconds = st.floats(0, 1e9)
positive = st.floats(1e-6, 1e9)
durations = st.builds(Durations, st.integers(0, 10**6), seconds, seconds)

EMPTY = RunStats(
    format=FORMAT, run=1, origin="o", host="h", world_size=1, began=1e9, next_within=0.0, end="", seconds=0.0, saves=0,
    failed=0, rollbacks=0, bytes_written=0, bytes_committed=0, bytes_restored=0, starting_seconds=0.0,
    saving_seconds=0.0, lost_seconds=0.0, unsaved_seconds=0.0, first_stall=Durations(), stall=Durations(),
    queued=Durations(), copied=Durations(), written=Durations(), committed=Durations(), waited=Durations(),
    device_waited=Durations(), between=Durations(), restored=Durations(),
)  # fmt: skip


def of_run(run: int, **values: Any) -> RunStats:
    """Of a run that measured these."""
    return msgspec.structs.replace(EMPTY, run=run, **values)


@st.composite
def histories(draw: st.DrawFn) -> History:
    numbers = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
    fields = dict.fromkeys(
        ["seconds", "starting_seconds", "saving_seconds", "lost_seconds", "unsaved_seconds"], seconds
    )
    fields |= dict.fromkeys(["restored", "device_waited", "stall", "first_stall", "committed", "waited"], durations)
    fields |= {"began": st.floats(-1e12, 1e12), "end": st.sampled_from(["", "closed", "failed"])}
    fields |= {"rollbacks": st.integers(0, 5)}
    runs = tuple(of_run(number, **draw(st.fixed_dictionaries(fields))) for number in numbers)
    return History(runs, draw(st.integers(0, 45)))


# ---- the interval -------------------------------------------------------------------------------------------------


@given(positive, positive)
def test_dalys_interval_is_youngs_where_saves_are_cheap_and_never_longer_than_the_time_between_failures_allows(
    cost: float, between: float
) -> None:
    interval = daly(cost, between)
    assert 0 < interval <= max(between, young(cost, between))
    if cost < between / 1e6:
        assert interval == pytest.approx(young(cost, between), rel=2e-3)
    if cost >= 2 * between:
        assert interval == between
    assert daly(cost, 2 * between) >= interval * (1 - 1e-9), "who fails more seldom saves more seldom"


def test_dalys_interval_is_that_of_the_formula() -> None:
    """By hand: a dump of 5 minutes, a failure a day."""
    ratio = 5 / (2 * 1440)
    expected = math.sqrt(2 * 5 * 1440) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 5
    assert daly(300, 86400) / 60 == pytest.approx(expected) == pytest.approx(116.69, abs=0.01)
    assert young(300, 86400) / 60 == pytest.approx(120.0)


@given(st.floats(0.001, 100), st.floats(0, 1000), st.integers(0, 60), st.floats(1, 1e8))
def test_a_suggestion_lies_within_its_bounds_and_is_no_shorter_than_a_commit(
    cost: float, latency: float, count: int, running: float
) -> None:
    interval = suggested(cost, latency, Failures(count, running))
    assert latency <= interval.least <= interval.most
    assert (interval.best is None) == (count < 3)
    assert (interval.most == math.inf) == (count == 0)
    if interval.best is not None:
        assert interval.least <= interval.best <= interval.most


def test_the_bounds_of_the_failure_rate_are_the_exact_ones() -> None:
    """Chi-square quantiles from a table: 5 % and 95 % for 2n and 2n + 2 degrees of freedom, halved."""
    for count, least, most in ((1, 0.0513, 4.744), (4, 1.366, 9.154), (10, 5.425, 16.962)):
        low, high = Failures(count, 1000.0).bounds
        assert 1000 / low == pytest.approx(most, rel=1e-3)
        assert 1000 / high == pytest.approx(least, rel=2e-3)
    low, high = Failures(0, 1000.0).bounds
    assert (1000 / low, high) == (pytest.approx(3.0, rel=2e-3), math.inf)


def test_bounds_for_many_failures_go_on_from_the_exact_ones_and_take_no_time() -> None:
    (low, high), (next_low, next_high) = (Failures(count, 1000.0 * count).bounds for count in (MANY, MANY + 1))
    assert next_low == pytest.approx(low, rel=2e-3)
    assert next_high == pytest.approx(high, rel=2e-3)
    assert low < next_low < 1000.0 < next_high < high
    assert Failures(10**15, 1e15).bounds == (pytest.approx(1.0), pytest.approx(1.0))


# ---- goodput ------------------------------------------------------------------------------------------------------


@given(histories())
def test_the_parts_of_the_time_sum_up_to_it_whatever_was_told(history: History) -> None:
    goodput = history.goodput
    assert 0 <= goodput.fraction <= 1
    parts = dataclasses.astuple(goodput)
    assert min(parts) >= 0
    assert goodput.wall == pytest.approx(sum(run.seconds for run in history.runs) + goodput.down + goodput.paused)
    assert history.failures.count >= history.silent >= 0
    interval = history.interval
    assert interval is None or 0 <= interval.least <= interval.most


def test_a_crash_loses_what_was_trained_since_the_last_committed_save_and_the_time_until_the_next_start() -> None:
    crashed = of_run(1, began=1000.0, seconds=100.0, saving_seconds=5.0, unsaved_seconds=30.0)
    closed = of_run(2, began=1140.0, seconds=60.0, end="closed", unsaved_seconds=10.0, restored=Durations(1, 4.0, 4.0))
    again = of_run(3, began=1250.0, seconds=10.0, unsaved_seconds=10.0)
    history = History((crashed, closed, again), 3)
    assert history.failures == Failures(1, 170.0)
    goodput = history.goodput
    assert (goodput.lost, goodput.down, goodput.paused) == (30.0, 40.0, 50.0)
    assert (goodput.saving, goodput.restoring, goodput.productive) == (5.0, 4.0, 131.0)
    assert goodput.fraction == pytest.approx(131 / 260)
    assert History((again,), 4).failures.count == 1, "the log has a run after it"
    assert History((again,), 3).failures.count == 0, "it may go on"


def test_a_run_without_a_word_counts_as_a_failure_and_a_clock_that_goes_back_as_no_time() -> None:
    before, after = of_run(3, began=5000.0, seconds=10.0, end="closed"), of_run(6, began=10.0, seconds=10.0)
    history = History((before, after), 6)
    assert (history.silent, history.failures.count) == (2, 2)
    assert (history.goodput.wall, history.goodput.fraction) == (20.0, 1.0)


def test_the_cost_of_a_save_leaves_the_first_of_a_run_out_if_there_are_others() -> None:
    first = of_run(1, first_stall=Durations(1, 9.0, 9.0))
    more = of_run(2, first_stall=Durations(1, 7.0, 7.0), stall=Durations(4, 2.0, 1.0), waited=Durations(3, 6.0, 3.0))
    assert History(()).cost is None
    assert History((first,)).cost == 9.0
    assert History((first, more)).cost == 0.5 + 6.0 / 6
