"""What waits to be logged: which state comes of each intention, and of none."""

from __future__ import annotations

import pytest

from distckpt.coordinator.machine.intentions import BeginRun, Claim, Commit, Discard, Forget, Reprieve, Retire, SetPin
from distckpt.coordinator.machine.records import never_committed
from distckpt.coordinator.messages import OpenRun
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.keep import Retention
from tests.support.driving import attempt_of, record

ONE, TWO, THREE = (record(number, attempt_of(1, number)) for number in (1, 2, 3))
NOBODY: frozenset[str] = frozenset()


def numbers(records: tuple[CheckpointRecord, ...]) -> list[int]:
    return [one.number for one in records]


def test_a_commit_retires_what_it_pushes_out_with_the_same_entry() -> None:
    state = Commit(THREE, 7, Retention(2), NOBODY).apply(State(active=(ONE, TWO), saves=6))
    assert (numbers(state.active), numbers(state.retiring), state.saves) == ([2, 3], [1], 7)


def test_a_commit_retires_nothing_that_is_read_and_nothing_at_all_if_that_is_not_known() -> None:
    before = State(active=(ONE, TWO))
    assert numbers(Commit(THREE, 1, Retention(1), frozenset({ONE.attempt})).apply(before).retiring) == [2]
    assert Commit(THREE, 1, Retention(1), None).apply(before).retiring == ()


def test_nothing_retires_in_a_run_that_has_begun_meanwhile() -> None:
    """A manager that is only made deletes nothing, so what an older one wanted to retire stays."""
    before = State(active=(ONE, TWO), run=4)
    retire = Retire(4, Retention(1), NOBODY)
    after = retire.apply(before)
    assert after is not None
    assert numbers(after.retiring) == [1]
    begun = BeginRun(OpenRun("next", 0, 1, "host", "ckpt", Retention(1), 30.0)).apply(before)
    assert retire.apply(begun) is None


def test_a_run_that_the_log_has_lost_keeps_its_number() -> None:
    """Its other processes still know that."""
    begun = BeginRun(OpenRun("next", 0, 1, "host", "ckpt", Retention(), 30.0, run=9)).apply(State(run=4, saves=3))
    assert (begun.run, begun.run_token, begun.saves) == (9, "next", 0)


def test_a_claim_commits_what_was_sealed_after_the_newest_in_the_order_of_age() -> None:
    state = Claim((THREE, ONE, TWO), "mine").apply(State(active=(record(9, attempt_of(1, 1)),)))
    assert numbers(state.active) == [9, 2, 3]


@pytest.mark.parametrize(("before", "after"), [("", "mine"), ("the first one's", "the first one's")])
def test_a_log_is_named_by_its_first_claim_for_ever(before: str, after: str) -> None:
    assert Claim((), "mine").apply(State(origin=before)).origin == after


@pytest.mark.parametrize(
    "intention",
    [
        Retire(0, Retention(5), NOBODY),
        Discard(never_committed("ckpt", 2, TWO.attempt, 1.0, 1)),
        Forget(frozenset({THREE.attempt})),
        SetPin(1, 7, "ckpt", True),
        SetPin(1, 1, "ckpt", False),
        Reprieve(frozenset({ONE.attempt, THREE.attempt})),
    ],
)
def test_what_changes_nothing_is_not_logged(intention: Retire | Discard | Forget | SetPin | Reprieve) -> None:
    assert intention.apply(State(active=(ONE, TWO))) is None


def test_a_failed_save_is_to_be_deleted_and_forgotten() -> None:
    failed = never_committed("ckpt", 3, THREE.attempt, 1.0, 1)
    state = Discard(failed).apply(State(active=(ONE,)))
    assert state == State(active=(ONE,), retiring=(failed,))
    assert Forget(frozenset({THREE.attempt})).apply(state) == State(active=(ONE,))


def test_what_was_pinned_in_time_comes_back_and_what_never_was_a_checkpoint_does_not() -> None:
    failed = never_committed("ckpt", 3, THREE.attempt, 1.0, 1)
    after = Reprieve(frozenset({ONE.attempt, THREE.attempt})).apply(State(active=(TWO,), retiring=(ONE, failed)))
    assert after == State(active=(TWO,), preserved=(ONE,), retiring=(failed,))


def test_the_newest_of_a_number_is_pinned_and_all_of_them_are_unpinned() -> None:
    older = record(1, attempt_of(1, 0), pinned=True)
    pinned = SetPin(1, 1, "ckpt", True).apply(State(active=(ONE, TWO), preserved=(older,)))
    assert pinned is not None
    assert [one.pinned for one in (*pinned.active, *pinned.preserved)] == [True, False, True]
    unpinned = SetPin(1, 1, "ckpt", False).apply(pinned)
    assert unpinned is not None
    assert not any(one.pinned for one in (*unpinned.active, *unpinned.preserved))
