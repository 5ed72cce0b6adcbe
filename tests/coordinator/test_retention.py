"""Retention against what TensorFlow's manager really does, and against a small model of it."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.coordinator.machine.records import committed
from distckpt.coordinator.machine.retention import recover, sweep
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.keep import Retention
from tests.support import reference_manager
from tests.support.part import examples

NOBODY: frozenset[str] = frozenset()


def record(number: int, time: float = 0.0, *, pinned: bool = False) -> CheckpointRecord:
    return CheckpointRecord(
        name="ckpt",
        number=number,
        attempt=f"e1-{number:032x}",
        manifest_size=1,
        manifest_crc32c=0,
        time=time,
        world_size=1,
        nbytes=1,
        pinned=pinned,
    )


def numbers(records) -> list[int]:
    return [one.number for one in records]


class Manager:
    """What a coordinator does with a state over the life of several managers, without any of its machinery."""

    def __init__(self) -> None:
        self.logged = State()
        self.made: float | None = None
        self.retention = Retention()
        self.deleted: list[int] = []

    def restart(self, now: float, max_to_keep: int | None, hours: float | None = None) -> None:
        self.made = now
        self.retention = Retention(max_to_keep, hours)

    def save(self, number: int, now: float) -> None:
        state = committed(self.state, record(number, now), 0)
        self.made = None
        swept = sweep(state.active, self.retention, state.last_preserved_timestamp, NOBODY)
        self.logged = msgspec.structs.replace(
            state,
            active=swept.active,
            preserved=state.preserved + swept.preserved,
            last_preserved_timestamp=swept.last_preserved,
        )
        self.deleted += numbers(swept.retire)

    @property
    def state(self) -> State:
        return self.logged if self.made is None else recover(self.logged, self.made)

    @property
    def on_disk(self) -> list[int]:
        return sorted(numbers((*self.state.active, *self.state.preserved)))


# ---- the traces -------------------------------------------------------------------------------------------------------


def test_trace_a_retention_over_two_restarts():
    manager = Manager()
    manager.restart(now=3.0, max_to_keep=2)
    assert manager.state.last_preserved_timestamp == 2.0
    manager.save(1, 10000.0)
    manager.save(2, 13610.0)
    assert [one.time for one in manager.state.active] == [10000.0, 13610.0]

    manager.restart(now=13611.0, max_to_keep=2, hours=1.5)
    manager.save(3, 14330.0)
    assert (numbers(manager.state.active), manager.state.last_preserved_timestamp) == ([2, 3], 10000.0)
    manager.save(4, 16130.0)
    assert manager.deleted == [2]
    manager.save(5, 17930.0)
    assert (manager.deleted, manager.state.last_preserved_timestamp) == ([2, 3], 10000.0)

    manager.restart(now=17931.0, max_to_keep=2, hours=1.5)
    manager.save(6, 17940.0)
    assert manager.state.last_preserved_timestamp == 16130.0
    assert numbers(manager.state.active) == [5, 6]
    assert manager.on_disk == [1, 4, 5, 6]


def test_trace_b_clock_reset():
    manager = Manager()
    manager.restart(now=9999.0, max_to_keep=1, hours=1.0)
    for number, now in ((1, 10000.0), (2, 13600.0), (3, 17200.0)):
        manager.save(number, now)
    assert manager.deleted == [1]
    assert (numbers(manager.state.preserved), manager.state.last_preserved_timestamp) == ([2], 13600.0)

    manager.restart(now=5000.0, max_to_keep=1)
    assert manager.state.active == ()
    assert numbers(manager.logged.newest_first())[0] == 3

    manager.save(4, 5010.0)
    manager.save(5, 5020.0)
    assert manager.on_disk == [2, 3, 5]
    assert [one.time for one in manager.state.active] == [5020.0]
    assert (numbers(manager.state.active), manager.state.last_preserved_timestamp) == ([5], 5000.0)


# ---- rules, one by one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_to_keep", [None, 0])
def test_without_max_to_keep_everything_stays_and_the_timestamp_too(max_to_keep):
    active = tuple(record(number, 1e6 * number) for number in range(9))
    swept = sweep(active, Retention(max_to_keep, 1.0), 5.0, NOBODY)
    assert (swept.active, swept.preserved, swept.retire, swept.last_preserved) == (active, (), (), 5.0)


def test_oldest_by_save_order_not_by_number_goes_first():
    swept = sweep((record(9), record(2), record(5)), Retention(2), 0.0, NOBODY)
    assert (numbers(swept.retire), numbers(swept.active)) == ([9], [2, 5])


@pytest.mark.parametrize(("max_to_keep", "stay"), [(0.5, [5]), (2.5, [2, 5]), (9.5, [9, 2, 5])])
def test_a_number_to_keep_that_is_not_whole_is_rounded_down_but_never_to_none(max_to_keep, stay):
    """As in TensorFlow, where more than 2.5 are too many."""
    assert numbers(sweep((record(9), record(2), record(5)), Retention(max_to_keep), 0.0, NOBODY).active) == stay


@pytest.mark.parametrize("hours", [None, 0, 0.0])
def test_without_hours_nothing_is_preserved(hours):
    assert sweep((record(1, 1e9), record(2)), Retention(1, hours), 0.0, NOBODY).preserved == ()


def test_preserved_at_exactly_n_hours_and_the_timestamp_is_its_own():
    active = (record(1, 3600.0), record(2, 7199.0), record(3, 7200.0), record(4, 9e9))
    swept = sweep(active, Retention(1, 1.0), 0.0, NOBODY)
    assert (numbers(swept.preserved), numbers(swept.retire), swept.last_preserved) == ([1, 3], [2], 7200.0)


def test_hours_may_be_fractional():
    swept = sweep((record(1, 36.0), record(2, 71.9), record(3)), Retention(1, 0.01), 0.0, NOBODY)
    assert (numbers(swept.preserved), numbers(swept.retire)) == ([1], [2])


def test_a_state_without_timestamp_preserves_the_first_that_is_evicted():
    assert numbers(sweep((record(1, 1e9), record(2)), Retention(1, 10.0), 0.0, NOBODY).preserved) == [1]


def test_pinned_and_protected_stay_active_in_their_place():
    active = (record(1), record(2, pinned=True), record(3), record(4), record(5))
    swept = sweep(active, Retention(1), 0.0, frozenset({record(3).attempt}))
    assert (numbers(swept.active), numbers(swept.retire)) == ([2, 3, 5], [1, 4])


def test_what_is_spared_takes_no_place_of_younger_ones():
    pinned = tuple(record(number, pinned=True) for number in range(5))
    young = tuple(record(number) for number in range(5, 8))
    assert sweep((*pinned, *young), Retention(3), 0.0, NOBODY).active == (*pinned, *young)


def test_the_newest_always_stays():
    assert numbers(sweep((record(1), record(2)), Retention(-1), 0.0, NOBODY).active) == [2]


def test_recover_a_fresh_directory_leaves_a_second_of_slack():
    assert recover(State(), 100.0) == State(last_preserved_timestamp=99.0)


def test_recover_keeps_what_is_strictly_younger_than_the_last_preserved():
    state = State(active=(record(1, 5.0), record(2, 5.5)), last_preserved_timestamp=5.0)
    after = recover(state, 10.0)
    assert (numbers(after.active), numbers(after.preserved)) == ([2], [1])


def test_recover_clamps_times_after_the_clock_went_back_a_little():
    state = State(active=(record(1, 50.0), record(2, 90.0)), last_preserved_timestamp=10.0)
    after = recover(state, 60.0)
    assert [one.time for one in after.active] == [50.0, 60.0]
    assert after.last_preserved_timestamp == 10.0


def test_recover_deletes_nothing_even_if_there_are_too_many():
    state = State(active=tuple(record(number, 5.0 + number) for number in range(9)), last_preserved_timestamp=1.0)
    assert recover(state, 100.0).active == state.active


def test_recover_counts_from_now_while_nothing_was_ever_committed():
    state = State(retiring=(record(1),), run=4, run_token="t", saves=7, last_preserved_timestamp=1.0)
    assert recover(state, 100.0) == msgspec.structs.replace(state, last_preserved_timestamp=99.0)


def test_recover_touches_neither_run_nor_retiring():
    state = State((record(2, 9.0),), (), (record(1),), run=4, run_token="t", saves=7, last_preserved_timestamp=1.0)
    assert recover(state, 100.0) == state


def test_the_newest_is_the_last_one_committed_whatever_the_clock_said():
    """It may be older, by its time, than one that is still managed."""
    state = State(active=(record(1, 500.0), record(2, 50.0)), last_preserved_timestamp=100.0)
    assert numbers(state.newest_first()) == [2, 1]
    after = recover(state, 300.0)
    assert (numbers(after.active), numbers(after.preserved)) == ([1], [2])
    assert numbers(committed(after, record(3, 301.0), 1).newest_first()) == [3, 2, 1]


# ---- a model of the original -----------------------------------------------------------------------------------------------


SETTINGS = st.tuples(st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([None, 0, 0.5, 1.0, 1.5, 24.0]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.sampled_from([0.0, 1.0, 600.0, 1799.0, 1800.0, 3600.0, 5000.0, 90000.0])),
        st.tuples(st.just("jump"), st.sampled_from([-100000.0, -7200.0, -1800.0, -1.0, 3600.0])),
        st.tuples(st.just("restart"), SETTINGS),
    ),
    max_size=40,
)


@settings(max_examples=examples(300), deadline=None)
@given(first=SETTINGS, steps=STEPS)
def test_decisions_are_those_of_the_original(first, steps):
    """The decisions alone, many of them; test_manager_model.py has the whole manager."""
    now, number = 100000.0, 0
    manager, directory = Manager(), reference_manager.Directory()

    def restart(max_to_keep, hours):
        manager.restart(now, max_to_keep, hours)
        checkpoint = reference_manager.Checkpoint(number)
        return reference_manager.ReferenceManager(checkpoint, directory, lambda: now, max_to_keep, hours)

    reference = restart(*first)
    for what, value in steps:
        if what == "restart":
            reference = restart(*value)
        elif what == "jump":
            now += value
        else:
            now, number = now + value, number + 1
            manager.save(number, now)
            reference.save(number)
        assert [(f"ckpt-{one.number}", one.time) for one in manager.state.active] == list(reference.managed.items())
        assert {f"ckpt-{number}" for number in manager.on_disk} == set(directory.files.values())
        assert manager.state.last_preserved_timestamp == reference.last_preserved
        assert numbers(manager.logged.newest_first())[:1] == ([number] if reference.latest else [])


@settings(max_examples=examples(300), deadline=None)
@given(
    times=st.lists(st.floats(0, 1e6), max_size=12),
    keep=st.sampled_from([None, 1, 2, 3]),
    hours=st.sampled_from([None, 1.0]),
    spared=st.sets(st.integers(0, 11)),
    pinned=st.sets(st.integers(0, 11)),
)
def test_sweep_spares_what_must_be_spared_and_loses_nothing(times, keep, hours, spared, pinned):
    active = tuple(
        msgspec.structs.replace(record(number, time), pinned=number in pinned) for number, time in enumerate(times)
    )
    protected = frozenset(record(number).attempt for number in spared)
    swept = sweep(active, Retention(keep, hours), 0.0, protected)
    everything = (*swept.active, *swept.preserved, *swept.retire)
    assert sorted(numbers(everything)) == numbers(active)
    gone = (*swept.preserved, *swept.retire)
    assert not any(one.pinned or one.attempt in protected for one in gone)
    newest = active[-(keep or math.inf) :] if keep else active
    assert not set(numbers(newest)) & set(numbers(gone))
    assert set(numbers(swept.active)) <= set(numbers(newest)) | pinned | spared
    again = sweep(swept.active, Retention(keep, hours), swept.last_preserved, protected)
    assert again.active == swept.active
