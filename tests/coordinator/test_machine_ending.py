"""Training is over when every rank has said so and the log does; a crash does not look like that."""

from __future__ import annotations

from distckpt.coordinator.machine.actions import Append, AppendUnknown, Exit
from distckpt.coordinator.messages import Accepted, FromRank, Leave
from distckpt.errors import CoordinatorError, StaleRunError
from tests.support.driving import TIMEOUT, Driver, kinds, last, refusal

FINAL = Leave(final=True)


def test_the_log_says_so_when_every_rank_has_and_all_are_told_then():
    driver = Driver().lead()
    run = driver.open(2)
    driver.save(run, 2, 1, 5)
    first = driver.ask(FromRank(run, 0, FINAL))
    again = driver.ask(FromRank(run, 0, FINAL))
    driver.settle()
    assert first not in driver.replies
    assert not driver.machine.state.ended
    second = driver.ask(FromRank(run, 1, FINAL))
    append = driver.take(Append)
    assert first not in driver.replies
    driver.perform(append)
    assert [driver.replies[ticket] for ticket in (first, again, second)] == [Accepted()] * 3
    assert (last(driver).kind, last(driver).state.ended) == ("end", True)
    assert driver.settled(FromRank(run, 1, FINAL)) == Accepted()
    assert kinds(driver).count("end") == 1


def test_a_rank_that_just_leaves_and_one_that_does_not_come_are_named():
    for leaves in (True, False):
        driver = Driver().lead()
        run = driver.open(2)
        driver.calm()
        ticket = driver.ask(FromRank(run, 0, FINAL))
        if leaves:
            driver.answer(FromRank(run, 1, Leave()))
        else:
            assert driver.machine.next_deadline() == driver.mono + TIMEOUT
            driver.wait(TIMEOUT)
        error = refusal(driver.replies[ticket])
        assert isinstance(error, CoordinatorError)
        assert "rank 1 (host1)" in str(error)
        assert "rank 0" not in str(error)
        assert not driver.machine.state.ended


def test_a_later_run_and_a_later_save_take_it_back():
    driver = Driver().lead()
    run = driver.open()
    driver.settled(FromRank(run, 0, FINAL))
    assert driver.machine.state.ended
    driver.save(run, 1, 1, 5)
    assert not driver.machine.state.ended
    driver.settled(FromRank(run, 0, FINAL))
    assert driver.machine.state.ended
    driver.open(token="next")
    assert not driver.machine.state.ended


def test_it_survives_the_coordinator_and_is_asked_again_of_the_next():
    driver = Driver().lead()
    run = driver.open(2)
    driver.ask(FromRank(run, 0, FINAL))
    second = driver.restarted("b")
    second.open(2, run=run)
    tickets = [second.ask(FromRank(run, rank, FINAL)) for rank in (0, 1)]
    second.settle()
    assert [second.replies[ticket] for ticket in tickets] == [Accepted()] * 2
    third = second.restarted("c")
    assert third.machine.state.ended
    third.open(2, run=run)
    assert third.answer(FromRank(run, 0, FINAL)) == Accepted()


def test_whoever_waits_is_told_of_a_newer_run_and_of_an_entry_that_cannot_be_written():
    driver = Driver().lead()
    run = driver.open(2)
    ticket = driver.ask(FromRank(run, 0, FINAL))
    driver.open(token="next")
    assert isinstance(refusal(driver.replies[ticket]), StaleRunError)
    driver = Driver().lead()
    run = driver.open()
    ticket = driver.ask(FromRank(run, 0, FINAL))
    for _ in range(5):
        driver.feed(AppendUnknown(driver.take(Append).entry, "no answer"))
        driver.wait(20.0)
    assert "no answer" in str(refusal(driver.replies[ticket]))


def test_a_coordinator_does_not_go_while_a_rank_waits_for_the_others():
    driver = Driver(idle_timeout=5.0).lead()
    run = driver.open(2)
    driver.ask(FromRank(run, 0, FINAL))
    driver.wait(10.0)
    assert not driver.has(Exit)
