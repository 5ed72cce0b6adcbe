"""Groups of readers and reports, as the machine sees them: what stays for them, what they are told, and who waits."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest

from distckpt import BestN, LatestN
from distckpt.coordinator.machine.actions import (
    Append,
    Delete,
    DeleteReports,
    LeasesRead,
    ReadLeases,
    SkipsTold,
    TellSkips,
)
from distckpt.coordinator.machine.following import Followed, Following
from distckpt.coordinator.messages import Committed, FromRank, Join, Joined, Lag, Leave, Refused, Skipped
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention, Rule
from tests.support.driving import TIMEOUT, Driver, attempt_of, kinds, last


def group(on_lag: str, *waiting: CheckpointRecord, most: int = 1, every: bool = True) -> Following:
    return Following("eval", every, most, on_lag, frozenset(), tuple(record.attempt for record in waiting))


def opened(keep: Rule | int, world: int = 1) -> tuple[Driver, int]:
    driver = Driver().lead()
    retention = Retention(keep) if isinstance(keep, int) else Retention(None, None, keep)
    return driver, driver.open(world, retention=retention)


def numbers(driver: Driver) -> list[int]:
    return [record.number for record in driver.machine.state.active]


# ---- what stays for them -----------------------------------------------------------------------------------------------


def test_what_a_group_holds_stays_until_it_is_done() -> None:
    driver, run = opened(1)
    first = driver.save(run, 1, 1, 1)
    driver.groups["eval"] = group("hold", first, most=1)
    for number in (2, 3):
        driver.save(run, 1, number, number)
    assert numbers(driver) == [1, 3]
    driver.groups.clear()
    driver.wait(30.0)
    driver.settle()
    assert numbers(driver) == [3], "it is looked again without any save"


def test_a_claim_stays_in_any_group_and_what_the_newest_is_wanted_of_does_not() -> None:
    driver, run = opened(1)
    first, second = driver.save(run, 1, 1, 1), driver.save(run, 1, 2, 2)
    claimed = Following("eval", False, 16, "skip", frozenset({second.attempt}), (first.attempt,))
    driver.groups["eval"] = claimed
    for number in (3, 4):
        driver.save(run, 1, number, number)
    assert numbers(driver) == [2, 4]


def test_a_group_that_lags_is_told_what_it_does_not_get_before_that_retires() -> None:
    driver, run = opened(1)
    records = [driver.save(run, 1, 1, 1)]
    driver.groups["eval"] = group("skip", *records)
    records.append(driver.save(run, 1, 2, 2))
    driver.groups["eval"] = group("skip", *records)
    driver.settle()
    driver.save(run, 1, 3, 3)
    told = [action for action in driver.done if isinstance(action, TellSkips)]
    assert [one.skips for one in told] == [{"eval": (records[0],)}]
    assert numbers(driver) == [2, 3]
    retired = next(at for at, action in enumerate(driver.done) if isinstance(action, Delete))
    assert driver.done.index(told[0]) < retired


def test_a_group_that_cannot_be_told_keeps_what_it_wants() -> None:
    driver, run = opened(1)
    first = driver.save(run, 1, 1, 1)
    driver.groups["eval"] = group("skip", first, most=0)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(TellSkips)
    driver.take(TellSkips)
    driver.feed(SkipsTold(done=False))
    driver.settle()
    assert numbers(driver) == [1, 2]
    driver.wait(30.0)
    driver.settle()
    assert numbers(driver) == [2]


def test_what_cannot_be_read_keeps_everything() -> None:
    driver, run = opened(1)
    for number in (1, 2, 3):
        tickets = driver.land(run, driver.plan(run, 1, number, number))
        driver.settle(ReadLeases)
        while driver.has(ReadLeases):
            driver.take(ReadLeases)
            driver.feed(LeasesRead(frozenset(), "_groups/eval is damaged"))
            driver.settle(ReadLeases)
        assert isinstance(driver.replies[tickets[0]], Committed)
    assert numbers(driver) == [1, 2, 3]


def test_what_came_after_the_groups_were_read_is_not_judged() -> None:
    """What was read for a commit may be older than the commit before."""
    driver, run = opened(LatestN(1))
    groups = (group("hold"),)
    for number in (1, 2, 3):
        driver.land(run, driver.plan(run, 1, number, number))
        driver.settle(ReadLeases)
        driver.take(ReadLeases)
        driver.feed(LeasesRead(frozenset(), "", frozenset(), Followed(groups, 1)))
        driver.settle(ReadLeases)
        driver.take(ReadLeases)
        driver.feed(LeasesRead(frozenset(), "not now"))
    assert numbers(driver) == [2, 3]


# ---- who waits ---------------------------------------------------------------------------------------------------------


def lagging(world: int = 1) -> tuple[Driver, int]:
    """A run with two checkpoints, of which a group still wants the first, and lets no more come."""
    driver, run = opened(5, world)
    first = driver.save(run, world, 1, 1)
    driver.groups["eval"] = group("block", first)
    driver.save(run, world, 2, 2)
    return driver, run


def joins(driver: Driver, run: int, world: int) -> list[int]:
    return [driver.ask(FromRank(run, rank, Join(3, 3, "8"))) for rank in range(world)]


def test_a_save_waits_for_a_group_that_blocks_and_no_rank_counts_as_missing() -> None:
    driver, run = lagging(world=2)
    tickets = joins(driver, run, 2)
    for _ in range(15):
        assert not any(ticket in driver.replies for ticket in tickets)
        driver.wait(2.0)
        driver.settle()
    assert [driver.replies[ticket] for ticket in tickets] == [Lag("eval", 1, 1, 30.0)] * 2
    tickets = joins(driver, run, 2)
    driver.wait(20.0)
    driver.settle()
    assert driver.mono > TIMEOUT
    assert not any(ticket in driver.replies for ticket in tickets)
    assert driver.machine.next_deadline() == driver.mono + 2.0
    driver.groups["eval"] = group("block")
    driver.wait(2.0)
    driver.settle()
    joined = {cast(Joined, driver.replies[ticket]).attempt for ticket in tickets}
    assert driver.save(run, 2, 3, 3).attempt in joined
    assert len(joined) == 1


def test_a_save_under_way_is_counted_so_that_never_more_wait_than_were_allowed() -> None:
    driver, run = opened(5)
    driver.groups["eval"] = group("block", most=2)
    driver.save(run, 1, 1, 1)
    driver.plan(run, 1, 2, 2)
    assert isinstance(driver.join(run, 0, 3, 3), Joined)
    assert driver.join(run, 0, 4, 4) is None


def test_who_skips_saves_skips_this_one_and_what_had_begun_goes_on() -> None:
    driver, run = lagging()
    assert driver.join(run, 0, 3, 3, skip_if_busy=1) == Skipped()
    assert isinstance(driver.join(run, 0, 4, None), Joined)
    assert isinstance(driver.join(run, 0, 5, 5, staged=True, attempt=attempt_of(1, 9)), Joined)


def test_no_save_waits_for_a_group_that_cannot_be_read() -> None:
    """Nothing is deleted then, and training goes on."""
    driver, run = lagging()
    [ticket] = joins(driver, run, 1)
    driver.wait(2.0)
    driver.take(ReadLeases)
    driver.feed(LeasesRead(frozenset(), "_groups/eval is damaged"))
    assert isinstance(driver.replies[ticket], Joined)


@pytest.mark.parametrize("how", ["a newer run", "they leave"])
def test_whoever_waits_is_told_when_there_is_nothing_to_wait_for(how: str) -> None:
    driver, run = lagging()
    [ticket] = joins(driver, run, 1)
    if how == "they leave":
        driver.answer(FromRank(run, 0, Leave()))
    else:
        driver.open(token="next")
    assert isinstance(driver.replies[ticket], Refused)


# ---- what is reported --------------------------------------------------------------------------------------------------


def test_a_report_costs_no_entry_and_is_deleted_once_one_that_has_it_counts() -> None:
    driver, run = opened(5)
    first = driver.save(run, 1, 1, 1)
    reported = driver.report(first.attempt, loss=1.5)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(Append)
    append = driver.take(Append)
    assert append.entry.state.active[0].metrics == {"loss": 1.5}
    assert not driver.has(DeleteReports)
    driver.perform(append)
    assert driver.take(DeleteReports) == DeleteReports((reported,))
    driver.settle()
    assert kinds(driver) == ["claim", "run", "commit", "commit"]


def test_of_two_reports_the_later_counts_also_if_one_is_folded_again() -> None:
    driver, run = opened(5)
    first = driver.save(run, 1, 1, 1)
    reports = [driver.report(first.attempt, loss=1.0, top1=7.0), driver.report(first.attempt, loss=2.0)]
    driver.save(run, 1, 2, 2)
    assert driver.machine.state.active[0].metrics == {"loss": 2.0, "top1": 7.0}
    driver.reports = list(reports)  # they could not be deleted
    other = driver.restarted("b")
    other.open(run=run)
    other.reports = list(reports)
    other.save(run, 1, 3, 3)
    assert other.machine.state.active[0].metrics == {"loss": 2.0, "top1": 7.0}


def test_reports_on_what_is_gone_go_with_it_and_those_on_what_is_unknown_stay() -> None:
    driver, run = opened(1)
    first = driver.save(run, 1, 1, 1)
    driver.save(run, 1, 2, 2)
    driver.report(first.attempt, loss=1.0)
    unknown = driver.report(attempt_of(7, 1), loss=1.0)
    retiring = msgspec.structs.replace(driver.machine.state, retiring=(first,))
    driver.log[max(driver.log) + 1] = msgspec.structs.replace(last(driver), seq=max(driver.log) + 1, state=retiring)
    other = Driver(driver.log, "b")
    other.reports = list(driver.reports)
    other.lead().open(run=run)
    other.save(run, 1, 3, 3)
    assert other.reports == [unknown], "who has been replaced does not know what its successor commits"


def test_late_reports_are_judged_without_any_save() -> None:
    driver, run = opened(BestN(1, "loss", "min", group="eval"))
    driver.calm()
    driver.groups["eval"] = group("skip", most=9, every=False)
    records = []
    for number in (1, 2, 3):
        driver.groups["eval"] = group("skip", *records, every=False)
        records.append(driver.save(run, 1, number, number))
    driver.groups["eval"] = group("skip", *records, every=False)
    driver.wait(30.0)
    driver.settle()
    assert numbers(driver) == [1, 2, 3], "none is judged while its evaluation is pending"
    for record, loss in zip(records, (2.0, 1.0, 3.0), strict=True):
        driver.report(record.attempt, loss=loss)
    driver.groups["eval"] = group("skip", every=False)
    driver.wait(30.0)
    driver.settle()
    assert numbers(driver) == [2, 3], "the best and the newest"
    assert [record.metrics for record in driver.machine.state.active] == [{"loss": 1.0}, {"loss": 3.0}]
    assert (last(driver).kind, driver.reports) == ("forget", [])
    driver.answer(FromRank(run, 0, Leave()))
    driver.wait(30.0)
    driver.settle()
    deadline = driver.machine.next_deadline()
    assert deadline is None or deadline > driver.mono + 100.0, "nobody is left to whom it matters"


def test_what_a_report_that_cannot_be_read_is_on_is_not_judged() -> None:
    driver, run = opened(BestN(1, "loss", "min"))
    first = driver.save(run, 1, 1, 1)
    for number in (2, 3):
        driver.land(run, driver.plan(run, 1, number, number))
        driver.settle(ReadLeases)
        while driver.has(ReadLeases):
            state = driver.take(ReadLeases).state
            unclear = Followed((), state.commits, frozenset({first.attempt}))
            driver.feed(LeasesRead(frozenset(), "", frozenset(), unclear))
            driver.settle(ReadLeases)
    assert numbers(driver) == [1, 3]


def test_a_clock_that_went_back_orphans_nothing_where_rules_decide() -> None:
    driver, run = opened(LatestN(2))
    driver.save(run, 1, 1, 1)
    driver.now -= 86400.0
    other = driver.restarted("b")
    other.open(token="next", retention=Retention(None, None, LatestN(2)))
    for number in (2, 3):
        other.save(2, 1, number, number)
    assert (numbers(other), other.machine.state.preserved) == ([2, 3], ())


def test_a_better_one_that_is_reported_late_takes_the_place_of_the_best_without_any_save() -> None:
    driver, run = opened(BestN(1, "loss", "min"))
    driver.report(driver.save(run, 1, 1, 1).attempt, loss=1.0)
    second = driver.save(run, 1, 2, 2)
    assert numbers(driver) == [1, 2]
    driver.report(second.attempt, loss=0.5)
    driver.wait(30.0)
    driver.settle()
    assert numbers(driver) == [2]
