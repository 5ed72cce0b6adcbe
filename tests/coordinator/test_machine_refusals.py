"""Entries that no reader would take: they are not written, whoever asked for them is told, and everything else goes on."""

from __future__ import annotations

import pytest

from distckpt.coordinator.machine.actions import Append, Appended, AppendRefused, Exit
from distckpt.coordinator.messages import Accepted, OpenRun, Pin, RunOpened
from distckpt.errors import CoordinatorError, UnreadableError
from distckpt.keep import Retention
from tests.support.driving import TIMEOUT, Driver, kinds, last, refusal, saved_three


def refuse(driver: Driver) -> str:
    """The entry that is to be appended next is refused; its kind."""
    entry = driver.take(Append).entry
    driver.feed(AppendRefused(entry, "too long to be read. Keep fewer"))
    return entry.kind


def test_a_commit_that_is_refused_fails_the_save_by_name_and_the_next_one_succeeds() -> None:
    driver, run, saved = saved_three()
    before = last(driver).state.active
    tickets = driver.land(run, driver.plan(run, 2, 4, 40))
    driver.settle(Append)
    assert refuse(driver) == "commit"
    for ticket in tickets:
        error = refusal(driver.replies[ticket])
        assert isinstance(error, UnreadableError)
        assert error.number == 40
        assert "checkpoint 40 was not saved: too long to be read. Keep fewer" in str(error)
    assert driver.machine.state.active == before
    driver.settle()
    assert driver.machine.state.active == before
    assert kinds(driver)[-2:] == ["retire", "forget"]  # what was sealed cannot come back
    assert driver.save(run, 2, 5, 50) == last(driver).state.active[-1]
    assert [record.number for record in last(driver).state.active] == [record.number for record in saved] + [50]


def test_nothing_is_tried_again_by_itself() -> None:
    driver, run, _ = saved_three()
    driver.land(run, driver.plan(run, 2, 4, 40))
    driver.settle(Append)
    while driver.has(Append):
        refuse(driver)
        driver.settle(Append)
    driver.wait(3600.0)
    driver.settle(Append)
    assert not driver.has(Append)


def test_what_waits_behind_a_refused_entry_is_appended() -> None:
    driver, _, _ = saved_three()
    pinned, unpinned = driver.ask(Pin(10, True)), driver.ask(Pin(20, True))
    assert refuse(driver) == "pin"
    error = refusal(driver.replies[pinned])
    assert isinstance(error, CoordinatorError)
    assert "Keep fewer" in str(error)
    driver.settle()
    assert driver.replies[unpinned] == Accepted()
    assert [record.pinned for record in last(driver).state.active] == [False, True, False]


def test_a_run_that_cannot_begin_is_told_so_and_the_one_before_goes_on() -> None:
    driver, run, _ = saved_three()
    tickets = [driver.ask(OpenRun("other", rank, 2, "h", "ckpt", Retention(), TIMEOUT)) for rank in range(2)]
    assert refuse(driver) == "run"
    for ticket in tickets:
        assert "the run cannot begin: too long to be read" in str(refusal(driver.replies[ticket]))
    driver.save(run, 2, 4, 40)
    again = driver.ask(OpenRun("other", 0, 2, "h", "ckpt", Retention(), TIMEOUT))
    driver.settle()
    assert isinstance(driver.replies[again], RunOpened)


def test_a_directory_that_cannot_be_claimed_is_refused_to_all() -> None:
    driver = Driver()
    ticket = driver.ask(OpenRun("job", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    driver.settle(Append)
    assert refuse(driver) == "claim"
    error = refusal(driver.replies[ticket])
    assert isinstance(error, CoordinatorError)
    assert "cannot be claimed: too long to be read" in str(error)
    assert driver.has(Exit)
    assert driver.machine.next_deadline() is None


@pytest.mark.parametrize("late", [AppendRefused, Appended])
def test_a_late_answer_about_a_refused_entry_changes_nothing(late: type[AppendRefused | Appended]) -> None:
    driver, run, _ = saved_three()
    ticket = driver.ask(Pin(10, True))
    entry = driver.take(Append).entry
    driver.feed(AppendRefused(entry, "too long"))
    before = driver.machine.state
    driver.feed(AppendRefused(entry, "too long") if late is AppendRefused else Appended(entry, entry.seq))
    assert driver.machine.state == before
    assert ticket in driver.replies
    driver.save(run, 2, 4, 40)
