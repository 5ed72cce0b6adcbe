"""The ``checkpoint`` file follows the log, one state at a time, and whoever waits for it is told."""

from __future__ import annotations

from distckpt.coordinator.machine.actions import Exit, Publish, Published
from distckpt.coordinator.messages import Accepted, AwaitPublished, FromRank, Leave, Planned, Unknown
from distckpt.format.json.log import Entry
from tests.support.driving import Driver


def begun(driver: Driver, run: int, *orders: int) -> list[dict[int, tuple[str, Planned]]]:
    """Saves that only lack their receipts."""
    return [driver.plan(run, 1, order, 10 * order) for order in orders]


def committed(driver: Driver, run: int, *saves: dict[int, tuple[str, Planned]]) -> None:
    """Their states are not published yet."""
    for save in saves:
        driver.land(run, save)
        driver.settle(Publish)


def leading() -> tuple[Driver, int]:
    driver = Driver().lead()
    return driver, driver.open(1)


def newest_number(entry: Entry) -> int:
    return entry.state.active[-1].number


def test_states_are_published_one_at_a_time_and_only_the_newest_of_those_that_wait() -> None:
    driver, run = leading()
    committed(driver, run, *begun(driver, run, 1, 2, 3))
    first = driver.take(Publish)
    assert newest_number(first.entry) == 10
    assert not driver.has(Publish)
    driver.feed(Published(first.entry))
    second = driver.take(Publish)
    assert newest_number(second.entry) == 30
    driver.feed(Published(first.entry))  # late, and about another one
    assert not driver.has(Publish)
    driver.feed(Published(second.entry))
    assert not driver.has(Publish)


def test_who_waits_is_told_when_all_that_was_committed_by_then_is_published() -> None:
    driver, run = leading()
    assert driver.answer(FromRank(run, 0, AwaitPublished())) == Accepted()
    saves = begun(driver, run, 1, 2, 3)
    committed(driver, run, *saves[:2])
    waits = driver.ask(FromRank(run, 0, AwaitPublished()))
    first = driver.take(Publish)
    driver.feed(Published(first.entry))
    assert waits not in driver.replies
    committed(driver, run, saves[2])
    driver.feed(Published(driver.take(Publish).entry))
    assert driver.replies[waits] == Accepted()  # it does not wait for what came later
    assert driver.has(Publish)


def test_who_waits_at_another_coordinator_begins_again() -> None:
    driver, run = leading()
    committed(driver, run, *begun(driver, run, 1))
    other = driver.restarted("b")
    assert other.answer(FromRank(run, 0, AwaitPublished())) == Unknown()


def test_a_coordinator_does_not_end_before_the_state_is_published() -> None:
    driver = Driver(idle_timeout=60.0).lead()
    run = driver.open(1)
    committed(driver, run, *begun(driver, run, 1))
    driver.answer(FromRank(run, 0, Leave()))
    driver.wait(1000.0)
    assert not driver.has(Exit)
    driver.settle()
    assert any(isinstance(action, Exit) for action in driver.done)
