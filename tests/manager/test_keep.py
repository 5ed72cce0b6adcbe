"""Rules that say what stays: what each keeps of any records, and that no rule deletes what it must not judge."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import AnyOf, BestN, EveryHours, EveryNumbers, LatestN
from distckpt.coordinator.machine.following import Followed, Following
from distckpt.coordinator.machine.retention import sweep
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Pending, Retention, Rule
from tests.support.driving import attempt_of, record

HOUR = 3600.0


def made(number: int, hours: float = 0.0, **metrics: float) -> CheckpointRecord:
    return record(number, attempt_of(1, number), hours * HOUR, metrics=metrics, order=number)


def kept(rule: Rule, records: Sequence[CheckpointRecord], pending: Pending | None = None) -> list[int]:
    attempts = rule.keeps(records, pending or Pending(commits=1000))
    return [one.number for one in records if one.attempt in attempts]


def test_the_latest_are_those_saved_last_whatever_their_numbers_and_times() -> None:
    assert kept(LatestN(2), [made(9, 5.0), made(2, 7.0), made(5, 1.0)]) == [2, 5]
    assert kept(LatestN(9), [made(1)]) == [1]


def test_the_best_are_judged_by_their_metric_and_of_equal_ones_the_older_stays() -> None:
    records = [made(1, loss=3.0), made(2, loss=1.0), made(3), made(4, loss=1.0), made(5, loss=2.0, top1=9.0)]
    assert kept(BestN(1, "loss", "min"), records) == [2]
    assert kept(BestN(2, "loss", "min"), records) == [2, 4]
    assert kept(BestN(2, "loss", "max"), records) == [1, 5]
    assert kept(BestN(3, "top1", "max"), records) == [5]


def test_what_a_group_may_still_speak_of_stays_and_takes_no_place() -> None:
    rule = BestN(1, "loss", "min", group="eval")
    records = [made(1, loss=2.0), made(2, loss=1.0), made(3, loss=0.5), made(4)]
    assert kept(rule, records, Pending({"eval": frozenset()}, 4)) == [3]
    assert kept(rule, records, Pending({"eval": frozenset({records[2].attempt, records[3].attempt})}, 4)) == [2, 3, 4]
    assert kept(rule, records, Pending({"eval": frozenset()}, 2)) == [2, 3, 4], "these came after the group was read"
    assert kept(rule, records, Pending({"other": frozenset()}, 4)) == [1, 2, 3, 4], "there is no such group yet"


def test_every_so_many_hours_one_stays_also_where_the_clock_goes_back() -> None:
    records = [made(number, hours) for number, hours in enumerate((10, 11, 11.9, 12, 13, 30, 5, 6, 7), 1)]
    assert kept(EveryHours(2), records) == [1, 4, 6, 7, 9]
    assert kept(EveryHours(0.5), [made(1, 0.0), made(2, 0.4), made(3, 0.5)]) == [1, 3]


def test_numbers_that_are_multiples_stay() -> None:
    assert kept(EveryNumbers(1000), [made(number) for number in (0, 1, 999, 1000, 2500, 3000)]) == [0, 1000, 3000]


def test_rules_are_joined_and_read_as_they_are_written() -> None:
    rule = LatestN(1) | EveryNumbers(10) | BestN(1, "loss", "min", "eval")
    assert rule == AnyOf(LatestN(1), EveryNumbers(10), BestN(1, "loss", "min", "eval"))
    assert rule == AnyOf(AnyOf(LatestN(1), EveryNumbers(10)), BestN(1, "loss", "min", "eval"))
    assert repr(rule.rules[0]) == "LatestN(n=1)"
    assert (rule.metrics, rule.groups) == ({"loss"}, {"eval"})
    assert pickle.loads(pickle.dumps(rule)) == rule, "they travel to the coordinator"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LatestN(0), "LatestN needs a whole number"),
        (lambda: EveryNumbers(2.5), "EveryNumbers needs a whole number"),
        (lambda: BestN(0, "loss", "min"), "BestN needs"),
        (lambda: BestN(1, "", "min"), "not the name of a metric"),
        (lambda: BestN(1, "loss", "least"), '"min" or "max"'),
        (lambda: BestN(1, "loss", "min", "a/b"), "not the name of a group"),
        (lambda: EveryHours(0), "positive number of hours"),
        (lambda: EveryHours(float("nan")), "positive number of hours"),
        (AnyOf, "needs a rule"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_where_it_is_made(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_manager_takes_rules_or_what_tensorflow_has(tmp_path: Any) -> None:
    checkpoint = distckpt.Checkpoint(step=1)
    for more in ({"max_to_keep": 3}, {"max_to_keep": None}, {"keep_checkpoint_every_n_hours": 1.0}):
        with pytest.raises(ValueError, match="not both"):
            distckpt.CheckpointManager(checkpoint, tmp_path, keep=LatestN(3), **more)
    with pytest.raises(TypeError, match="must be a rule"):
        distckpt.CheckpointManager(checkpoint, tmp_path, keep=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="joins rules"):
        LatestN(3) | 3  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


# ---- whatever the records ---------------------------------------------------------------------------------------------

COUNT = st.integers(1, 4)
RULES = st.recursive(
    st.one_of(
        st.builds(LatestN, COUNT),
        st.builds(BestN, COUNT, st.sampled_from(["loss", "top1"]), st.sampled_from(["min", "max"])),
        st.builds(BestN, COUNT, st.just("loss"), st.just("min"), st.sampled_from(["eval", "nobody"])),
        st.builds(EveryHours, st.sampled_from([0.5, 1.0, 24.0])),
        st.builds(EveryNumbers, st.integers(1, 5)),
    ),
    lambda rules: st.lists(rules, min_size=1, max_size=3).map(lambda some: AnyOf(*some)),
    max_leaves=4,
)
RECORDS = st.lists(
    st.tuples(
        st.floats(0, 200, allow_nan=False),
        st.dictionaries(st.sampled_from(["loss", "top1"]), st.sampled_from([0.0, 1.0, 2.0])),
    ),
    min_size=1,
    max_size=12,
).map(lambda rows: tuple(made(number, hours, **metrics) for number, (hours, metrics) in enumerate(rows)))
CHOSEN = st.sets(st.integers(0, 11))


@given(rule=RULES, records=RECORDS, spared=CHOSEN, pinned=CHOSEN, wanted=CHOSEN, held=CHOSEN, known=st.integers(0, 13))
def test_no_rule_deletes_the_newest_or_what_it_must_not_judge(
    rule: Rule,
    records: tuple[CheckpointRecord, ...],
    spared: set[int],
    pinned: set[int],
    wanted: set[int],
    held: set[int],
    known: int,
) -> None:
    records = tuple(msgspec.structs.replace(one, pinned=one.number in pinned) for one in records)
    attempts = {one.number: one.attempt for one in records}

    def of(numbers: set[int]) -> tuple[str, ...]:
        return tuple(attempts[number] for number in sorted(numbers) if number in attempts)

    groups = (
        Following("eval", False, 16, "skip", frozenset(), of(wanted)),
        Following("each", True, 16, "hold", frozenset(), of(held)),
    )
    followed = Followed(groups, known)
    retention = Retention(None, None, rule)
    found = sweep(records, retention, 0.0, frozenset(of(spared)), followed)
    assert (found.preserved, found.last_preserved) == ((), 0.0)
    assert sorted((*found.active, *found.retire), key=lambda one: one.number) == list(records)
    gone = {one.number for one in found.retire}
    assert records[-1].number not in gone
    assert not gone & (spared | pinned | held)
    assert all(number <= known for number in gone), "nobody knows yet who wants the others"
    if "eval" in rule.groups:
        assert not gone & wanted
    if "nobody" in rule.groups:
        assert not gone
    again = sweep(found.active, retention, 0.0, frozenset(of(spared)), followed)
    assert again.active == found.active, "what was decided stays decided"
