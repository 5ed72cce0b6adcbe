"""The coordinator's machine, one behaviour a test: which saves of the ranks are one, and ranks that fall out of step."""

from __future__ import annotations

from typing import cast

from distckpt.coordinator.machine.actions import ReadLeases
from distckpt.coordinator.messages import AwaitPlan, Committed, Describe, Fail, FromRank, Joined, Planned, Skipped
from distckpt.errors import MissingRanksError, NumberMismatchError, RankFailedError, SaveError
from distckpt.testing.sim_store import describe
from tests.support.driving import TIMEOUT, Driver, receipt, refusal


def two() -> tuple[Driver, int]:
    driver = Driver().lead()
    return driver, driver.open(2)


def attempt(reply) -> str:
    return cast(Joined, reply).attempt


def save(driver: Driver, run: int, orders: tuple[int, ...], number: int) -> Committed:
    """One whole save of ranks that count differently."""
    joined = {rank: driver.join(run, rank, order, number, digest="8") for rank, order in enumerate(orders)}
    assert len(set(map(attempt, joined.values()))) == 1
    for rank, reply in joined.items():
        if cast(Joined, reply).describe:
            driver.answer(FromRank(run, rank, Describe(attempt(reply), "8", describe(8))))
    waiting = {rank: driver.ask(FromRank(run, rank, AwaitPlan(attempt(reply)))) for rank, reply in joined.items()}
    driver.settle()
    plans = {rank: (attempt(joined[rank]), cast(Planned, driver.replies[at])) for rank, at in waiting.items()}
    tickets = driver.land(run, plans)
    driver.settle()
    assert driver.replies[tickets[0]] == driver.replies[tickets[-1]]
    return cast(Committed, driver.replies[tickets[0]])


def test_after_one_rank_saved_alone_the_others_save_with_it_again():
    driver, run = two()
    save(driver, run, (1, 1), 1)
    waits = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 2, 2, digest="8")))))
    driver.wait(TIMEOUT)
    assert refusal(driver.replies[waits]).ranks == (1,)
    for order, number in ((3, 2), (4, 3), (5, 4)):
        assert save(driver, run, (order, order - 1), number).record.number == number
    other = driver.restarted("b")
    other.open(2, run=run)
    assert save(other, run, (6, 5), 5).record.number == 5
    assert [record.number for record in other.machine.state.active] == [1, 2, 3, 4, 5]


def test_a_save_that_a_rank_has_missed_fails_as_soon_as_that_rank_goes_on():
    driver, run = two()
    waits = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 1, 5)))))
    joined = driver.join(run, 1, 1, 6)
    error = refusal(driver.replies[waits])
    assert isinstance(error, NumberMismatchError)
    assert error.numbers == {0: 5, 1: 6}
    assert "rank 0 (host0) saves 5, rank 1 (host1) saves 6" in str(error)
    assert attempt(driver.join(run, 0, 2, 6)) == attempt(joined)
    assert save(driver, run, (2, 1), 6).record.number == 6
    assert save(driver, run, (3, 2), 7).record.number == 7


def test_ranks_that_save_different_numbers_all_hear_of_both_and_the_next_save_works():
    driver, run = two()
    first = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 1, 5)))))
    second = driver.ask(FromRank(run, 1, AwaitPlan(attempt(driver.join(run, 1, 1, 6)))))
    assert refusal(driver.replies[first]).numbers == {0: 5, 1: 6}
    driver.wait(TIMEOUT)
    assert isinstance(refusal(driver.replies[second]), NumberMismatchError)
    assert refusal(driver.replies[second]).numbers == {0: 5, 1: 6}
    assert save(driver, run, (2, 2), 7).record.number == 7
    third = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 3, 8)))))
    fourth = driver.ask(FromRank(run, 1, AwaitPlan(attempt(driver.join(run, 1, 3, 9)))))
    assert driver.replies[third]
    save(driver, run, (4, 4), 10)
    assert set(refusal(driver.replies[fourth]).numbers.values()) == {9, 10}


def test_three_ranks_with_three_numbers_are_all_named():
    driver = Driver().lead()
    run = driver.open(3)
    tickets = []
    for rank, number in enumerate((10, 20, 30)):
        tickets.append(driver.ask(FromRank(run, rank, AwaitPlan(attempt(driver.join(run, rank, 1, number))))))
    driver.wait(TIMEOUT)
    for ticket in tickets:
        assert isinstance(refusal(driver.replies[ticket]), NumberMismatchError)
    assert refusal(driver.replies[tickets[2]]).numbers == {0: 10, 1: 20, 2: 30}
    assert save(driver, run, (2, 2, 2), 40).record.number == 40


def test_a_rank_that_saves_while_others_only_prepare_is_an_error_at_once():
    driver, run = two()
    waits = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 1, None)))))
    driver.join(run, 1, 1, 5)
    assert isinstance(refusal(driver.replies[waits]), SaveError)
    assert "rank 0 (host0) only prepares, rank 1 (host1) saves 5" in str(refusal(driver.replies[waits]))
    assert isinstance(driver.join(run, 0, 2, 5), Joined)


def test_a_rank_that_fails_before_the_others_come_leaves_all_in_step():
    driver, run = two()
    driver.answer(FromRank(run, 1, Fail(attempt(driver.join(run, 1, 1, 5)), "EncodeError: key")))
    assert isinstance(refusal(driver.join(run, 0, 1, 5)), RankFailedError)
    assert save(driver, run, (2, 2), 5).record.number == 5


def test_a_rank_that_was_slower_than_the_timeout_hears_that_its_save_has_failed():
    driver, run = two()
    waits = driver.ask(FromRank(run, 0, AwaitPlan(attempt(driver.join(run, 0, 1, 5)))))
    driver.wait(TIMEOUT + 2.0)
    again = driver.join(run, 0, 2, 5, age=1.0)
    assert isinstance(again, Joined)
    error = refusal(driver.join(run, 1, 1, 5, age=3.0))
    assert isinstance(error, MissingRanksError)
    assert error is refusal(driver.replies[waits])
    assert driver.join(run, 1, 2, 5) == again


def test_a_rank_that_comes_much_too_late_fails_alone_and_is_in_step_with_the_others_next_save():
    driver = Driver().lead()
    run = driver.open(3)
    for rank in (0, 2):
        driver.join(run, rank, 1, 5)
    driver.wait(TIMEOUT)
    joined = [attempt(driver.join(run, rank, 2, 6)) for rank in (0, 2)]
    error = refusal(driver.join(run, 1, 1, 5))
    assert isinstance(error, NumberMismatchError)
    assert error.numbers == {0: 6, 1: 5, 2: 6}
    assert attempt(driver.join(run, 1, 2, 6)) == joined[0] == joined[1]


def test_a_rank_that_comes_much_too_late_waits_for_the_others_to_try_again():
    driver, run = two()
    driver.join(run, 0, 1, 5)
    driver.wait(TIMEOUT)
    late = driver.join(run, 1, 1, 5)
    waits = driver.ask(FromRank(run, 1, AwaitPlan(attempt(late))))
    assert driver.join(run, 0, 2, 5) == late
    assert waits not in driver.replies
    driver, run = two()
    driver.join(run, 0, 1, 5)
    driver.wait(TIMEOUT)
    waits = driver.ask(FromRank(run, 1, AwaitPlan(attempt(driver.join(run, 1, 1, 5)))))
    joined = driver.join(run, 0, 2, 6)
    assert refusal(driver.replies[waits]).numbers == {0: 6, 1: 5}
    assert driver.join(run, 1, 2, 6) == joined


def test_a_slow_rank_joins_two_saves_in_flight_in_order():
    driver, run = two()
    joined = [attempt(driver.join(run, 0, order, order)) for order in (1, 2)]
    assert [attempt(driver.join(run, 1, order, order)) for order in (1, 2)] == joined


def test_a_number_that_is_saved_twice_at_once_is_two_saves_in_sequence():
    driver, run = two()
    joined = [attempt(driver.join(run, 0, order, 7)) for order in (1, 2)]
    assert joined[0] != joined[1]
    assert [attempt(driver.join(run, 1, order, 7)) for order in (1, 2)] == joined
    assert attempt(driver.join(run, 1, 1, 7)) == joined[0]


def test_a_skipped_save_is_skipped_by_all_though_its_number_is_being_saved_by_now():
    driver, run = two()
    planned = driver.plan(run, 2, 1, 5)
    assert driver.join(run, 0, 2, 6, skip_if_busy=1) == Skipped()
    driver.land(run, planned)
    driver.settle()
    later = driver.join(run, 0, 3, 6, skip_if_busy=1)
    assert isinstance(later, Joined)
    assert driver.join(run, 1, 2, 6, skip_if_busy=1) == Skipped()
    assert driver.join(run, 1, 3, 6, skip_if_busy=1) == later


def test_a_rank_that_has_given_a_save_up_without_a_word_holds_nobody():
    driver, run = two()
    driver.join(run, 0, 1, 5)
    waits = driver.ask(FromRank(run, 1, AwaitPlan(attempt(driver.join(run, 1, 1, 5)))))
    driver.join(run, 0, 2, 6, earlier=())
    assert isinstance(refusal(driver.replies[waits]), RankFailedError)
    assert "rank 0 (host0)" in str(refusal(driver.replies[waits]))


def test_late_copies_of_joins_open_nothing():
    driver, run = two()
    for order in range(1, 80):
        save(driver, run, (order, order), order)
    for old in (1, 79):
        assert not isinstance(driver.join(run, 0, old, old, earlier=()), Joined)
    driver.join(run, 0, 82, 82, earlier=((81, 81),))
    assert isinstance(refusal(driver.join(run, 0, 80, 80)), SaveError)
    assert isinstance(driver.join(run, 0, 81, 81), Joined)
    other = driver.restarted("b")
    other.open(2, run=run)
    assert isinstance(refusal(other.join(run, 0, 79, 79)), SaveError)


def test_after_a_restart_saves_in_flight_are_committed_in_save_order_in_whatever_order_they_come_back():
    driver, run = two()
    save(driver, run, (1, 1), 1)
    plans = [driver.plan(run, 2, order, number) for order, number in ((2, 2), (3, 3))]
    other = driver.restarted("b")
    other.open(2, run=run)
    back: dict[tuple[int, int], Joined] = {}
    for rank, at in ((0, 1), (1, 0), (1, 1), (0, 0)):
        former, plan = plans[at][rank]
        earlier = ((2, 2),) if at else ()
        more = {"plan": plan.plan, "staged": True, "attempt": former, "earlier": earlier}
        back[rank, at] = cast(Joined, other.join(run, rank, 2 + at, 2 + at, digest="8", **more))
        assert isinstance(back[rank, at], Joined)
    for at in range(2):
        assert back[0, at].attempt == back[1, at].attempt
        for rank in range(2):
            rows = plans[at][rank][1].rows
            other.answer(FromRank(run, rank, Describe(back[rank, at].attempt, "8", describe(8), rows)))
    other.settle()
    tickets = [
        other.ask(receipt(run, rank, back[rank, at].attempt, len(plans[at][rank][1].rows) // 4))
        for at in (1, 0)
        for rank in range(2)
    ]
    other.settle(ReadLeases)
    other.settle()
    assert all(isinstance(other.replies[ticket], Committed) for ticket in tickets)
    assert [record.number for record in other.machine.state.active] == [1, 2, 3]


def test_a_rank_that_comes_back_first_waits_for_the_right_save_of_a_number_saved_twice():
    driver, run = two()
    plans = {order: driver.join(run, 0, order, 7) for order in (1, 2)}
    other = driver.restarted("b")
    other.open(2, run=run)
    second = other.join(run, 0, 2, 7, attempt=attempt(plans[2]), staged=True, plan="p", earlier=((1, 7),))
    fresh = other.join(run, 1, 1, 7)
    assert attempt(fresh) != attempt(second), "what rank 0 saved first is still to come"
    first = other.join(run, 0, 1, 7, attempt=attempt(plans[1]), staged=True, plan="p", earlier=())
    assert attempt(first) == attempt(fresh)
    assert attempt(other.join(run, 1, 2, 7)) == attempt(second)
