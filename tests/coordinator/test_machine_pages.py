"""A coordinator whose log has pages: everything is as if it had none."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.coordinator.machine.actions import (
    Append,
    CollectGarbage,
    Delete,
    PagesRead,
    PageWritten,
    ReadPages,
    WritePage,
)
from distckpt.coordinator.messages import Accepted, Committed, Fail, FromRank, Join, MatchWith, Pin, Restore
from distckpt.errors import CheckpointNotFoundError, DamagedError, NoGoodCheckpointError
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.paging import Sizes, opened
from distckpt.keep import AnyOf, BestN, EveryHours, EveryNumbers, LatestN, Retention
from tests.support.driving import Driver, last, matched, receipt, refusal
from tests.support.part import examples

SIZES = Sizes(newest=2, page=3, most=12, together=2)
ALL = Retention(None)


def kept(count: int, retention: Retention = ALL) -> tuple[Driver, int, list[CheckpointRecord]]:
    driver = Driver(sizes=SIZES).lead()
    run = driver.open(retention=retention)
    saved = []
    for order in range(1, count + 1):
        driver.now += 10.0
        saved.append(driver.save(run, 1, order, order))
    return driver, run, saved


def whole(driver: Driver) -> State:
    return opened(last(driver).state, driver.pages)


def numbers(records: tuple[CheckpointRecord, ...]) -> list[int]:
    return [record.number for record in records]


def test_the_entry_of_a_long_run_is_short_and_nothing_is_lost():
    driver, _, saved = kept(40)
    assert whole(driver).active == tuple(saved)
    assert len(last(driver).state.active) < 5
    assert len(last(driver).state.pages) < 9
    assert driver.restarted("b").machine.state.pages == last(driver).state.pages


def test_a_page_is_durable_before_an_entry_refers_to_it():
    driver, run, _ = kept(4)
    driver.land(run, driver.plan(run, 1, 5, 5))
    driver.settle(WritePage, Append)
    page = driver.take(WritePage)
    assert not driver.has(Append)
    driver.perform(page)
    assert [ref.id for ref in driver.take(Append).entry.state.pages] == [page.page]


def test_a_page_that_cannot_be_written_holds_up_nothing():
    driver, run, _ = kept(4)
    driver.land(run, driver.plan(run, 1, 5, 5))
    driver.settle(WritePage)
    driver.feed(PageWritten(driver.take(WritePage).page, None))
    driver.settle()
    assert numbers(last(driver).state.active) == [1, 2, 3, 4, 5]
    driver.save(run, 1, 6, 6)
    assert numbers(last(driver).state.active) == [5, 6]


def test_a_number_that_is_in_a_page_is_replaced():
    driver, run, saved = kept(12)
    again = driver.save(run, 1, 13, 4)
    assert numbers(whole(driver).active) == [1, 2, 3, *range(5, 13), 4]
    assert [one.records for one in driver.done if isinstance(one, Delete)] == [(saved[3],)]
    assert whole(driver).active[-1] == again


def test_a_number_that_no_page_can_have_reads_none():
    driver, run, _ = kept(12)
    driver.done.clear()
    driver.save(run, 1, 13, 13)
    assert not [one for one in driver.done if isinstance(one, ReadPages) and len(one.pages) < SIZES.together]


def test_retention_that_turns_stricter_reads_pages_back_and_retires_what_is_in_them():
    driver, _, saved = kept(40)
    run = driver.open(token="job2", retention=Retention(5))
    newest = driver.save(run, 1, 1, 41)
    assert last(driver).state.pages == ()
    assert last(driver).state.active == (*saved[36:], newest)
    gone = [record.attempt for one in driver.done if isinstance(one, Delete) for record in one.records]
    assert gone == [record.attempt for record in saved[:36]]
    assert max(len(entry.state.retiring) for entry in driver.log.values()) <= 2 * SIZES.most


Step = tuple[str, int, float | None]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 30), st.just(None)),
        st.tuples(st.just("saves"), st.integers(1, 12), st.just(None)),
        st.tuples(st.sampled_from(["pin", "unpin"]), st.integers(1, 40), st.just(None)),
        st.tuples(st.just("job"), st.sampled_from([0, 0, 1, 3, 15]), st.sampled_from([None, 15.0, 45.0])),
        st.tuples(st.just("clock"), st.sampled_from([-200, -35, 60]), st.just(None)),
        st.tuples(st.just("crash"), st.just(0), st.just(None)),
    ),
    max_size=25,
)


def played(steps: list[Step], sizes: Sizes) -> list[list[tuple[int, int, float, bool]]]:
    """What active, preserved and retiring lists come to, whoever coordinates."""
    driver = Driver(sizes=sizes).lead()
    job, order, number = 1, 0, 100
    retention = ALL
    run = driver.open(token="job1", retention=retention)
    for at, (kind, value, hours) in enumerate(steps):
        driver.now += 10.0
        if kind == "job":
            job, order, retention = job + 1, 0, Retention(value or None, hours and hours / 3600.0)
        elif kind == "clock":
            driver.now += value
        elif kind in ("pin", "unpin"):
            driver.settled(Pin(value, kind == "pin"))
        if kind in ("job", "crash"):
            now = driver.now
            driver = driver.restarted(f"{at}") if kind == "crash" else driver
            driver.now, again = now, kind == "crash"
            run = driver.open(token=f"job{job}", retention=retention, run=run if again else 0)
        for _ in range({"save": 1, "saves": value}.get(kind, 0)):
            order, number = order + 1, number + 1
            driver.now += 5.0
            driver.save(run, 1, order, value if kind == "save" else number)
    state = whole(driver) if driver.log else State()
    active, rest = state.active, (sorted(state.preserved, key=lambda one: one.order), state.retiring)
    return [[(one.number, one.order, one.time, one.pinned) for one in records] for records in (active, *rest)]


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_all_comes_to_be_as_without_pages(steps: list[Step]):
    assert played(steps, SIZES) == played(steps, Sizes(1 << 20, 1 << 20, 1 << 20))


def test_preserved_ones_go_into_pages_whatever_is_kept():
    driver, _, _ = kept(40, Retention(1, 0.001))
    assert numbers(whole(driver).preserved) == list(range(1, 40))
    assert len(last(driver).state.preserved) < 6


def test_a_leased_one_of_a_page_stays_when_the_others_retire():
    driver, _, saved = kept(20)
    driver.leased = frozenset({saved[2].attempt})
    run = driver.open(token="job2", retention=Retention(1))
    driver.save(run, 1, 1, 21)
    assert numbers(whole(driver).active) == [3, 21]


def test_pages_full_of_pinned_ones_do_not_stop_retention():
    driver, _, _ = kept(20)
    for number in (1, 2, 3, 4, 5, 6):
        assert driver.settled(Pin(number, True)) == Accepted()
    assert [record.pinned for record in whole(driver).active][:7] == [True] * 6 + [False]
    run = driver.open(token="job2", retention=Retention(1))
    driver.save(run, 1, 1, 21)
    assert numbers(whole(driver).active) == [1, 2, 3, 4, 5, 6, 21]


def test_a_pin_finds_a_number_wherever_it_is():
    driver, _, _ = kept(20)
    assert driver.settled(Pin(2, True)) == Accepted()
    assert driver.settled(Pin(2, True)) == Accepted()
    assert isinstance(refusal(driver.settled(Pin(99, True))), CheckpointNotFoundError)
    assert driver.settled(Pin(2, False)) == Accepted()
    assert not any(record.pinned for record in whole(driver).active)


def test_a_page_that_cannot_be_read_is_named_and_holds_up_no_save():
    driver, run, saved = kept(12)
    lost = last(driver).state.pages[0]
    del driver.pages[lost.id]
    with pytest.raises(DamagedError, match=lost.id):
        raise refusal(driver.settled(Pin(2, True)))
    driver.save(run, 1, 13, 2)
    assert lost in last(driver).state.pages
    run = driver.open(token="job2", retention=Retention(1))
    driver.save(run, 1, 1, 14)
    assert last(driver).state.pages == (lost,)
    assert numbers(last(driver).state.active) == [14]
    gone = {record.number for one in driver.done if isinstance(one, Delete) for record in one.records}
    assert not gone & {record.number for record in saved[: lost.count]} - {2}


def test_a_restore_finds_a_number_that_is_in_a_page():
    driver, run, saved = kept(12)
    asked = driver.settled(FromRank(run, 0, Restore(0, 3)))
    assert cast(MatchWith, asked).record == saved[2]
    missing = driver.settled(FromRank(run, 0, Restore(1, 77)))
    assert isinstance(refusal(missing), CheckpointNotFoundError)


def test_a_restore_falls_back_through_all_pages():
    driver, run, saved = kept(12)
    lost = last(driver).state.pages[0]
    del driver.pages[lost.id]
    reply, tried = driver.settled(FromRank(run, 0, Restore(0, None))), []
    while isinstance(reply, MatchWith):
        tried.append(reply.record)
        reply = driver.settled(matched(run, 0, reply.record.attempt, refused="bad", round=reply.round, keys=None))
    assert tried == saved[: lost.count - 1 : -1]
    error = refusal(reply)
    assert isinstance(error, NoGoodCheckpointError)
    assert lost.id in str(error)


def test_a_rank_that_asks_late_hears_that_its_save_was_committed():
    driver, run, saved = kept(12)
    other = driver.restarted("b")
    assert other.settled(FromRank(run, 0, Join(1, 1, "d", attempt=saved[0].attempt))) == Committed(saved[0])
    other.open(run=run, token="job", retention=ALL)
    assert other.settled(receipt(run, 0, saved[1].attempt, 8)) == Committed(saved[1])
    assert other.settled(FromRank(run, 0, Fail(saved[2].attempt, "late"))) == Accepted()


def test_a_clock_that_went_back_preserves_pages_whole_and_in_part():
    driver, _, saved = kept(20)
    run = driver.open(token="job2", retention=Retention(2, 85.0 / 3600.0))
    driver.save(run, 1, 1, 21)  # 10 and 19 are preserved by age, or what is as old
    before = whole(driver)
    driver, _, saved = kept(20)
    driver.now = saved[0].time - 1000.0
    run = driver.open(token="job3", retention=ALL)
    driver.save(run, 1, 1, 21)
    assert numbers(before.active) == [20, 21]
    assert set(numbers(whole(driver).preserved)) == set(range(1, 21))
    assert numbers(whole(driver).active) == [21]


def test_garbage_knows_what_is_in_pages_and_which_pages_were_dropped():
    driver, run, _ = kept(12)
    before = {page.id for page in last(driver).state.pages}
    driver.save(run, 1, 13, 2)
    dropped = before - {page.id for page in last(driver).state.pages}
    assert dropped
    driver.wait(601.0)
    garbage = driver.take(CollectGarbage)
    while driver.has(CollectGarbage):
        garbage = driver.take(CollectGarbage)
    assert garbage.dropped >= dropped
    assert garbage.pages == last(driver).state.pages


def test_pages_that_come_after_the_end_change_nothing():
    driver, run, _ = kept(12)
    driver.land(run, driver.plan(run, 1, 13, 2))
    driver.settle(ReadPages)
    asked = driver.take(ReadPages)
    other = driver.restarted("b")
    assert other.machine.leading
    driver.feed(PagesRead(asked.asked, {page.id: driver.pages[page.id] for page in asked.pages}))
    seqs = set(driver.log)
    while driver.pending and not driver.has(Append):
        driver.perform(driver.pending.pop(0))
    assert set(driver.log) == seqs


def test_a_report_on_what_is_in_a_page_comes_into_the_log_and_is_deleted():
    driver, run, saved = kept(12)
    driver.report(saved[1].attempt, loss=1.5)
    driver.report(saved[7].attempt, loss=2.5)
    for order in (13, 14, 15):
        driver.save(run, 1, order, order)
    assert driver.reports == []
    found = {record.number: record.metrics for record in whole(driver).active if record.metrics}
    assert found == {2: {"loss": 1.5}, 8: {"loss": 2.5}}


def judged(sizes: Sizes) -> list[int]:
    driver = Driver(sizes=sizes).lead()
    run = driver.open(retention=ALL)
    for order in range(1, 31):
        driver.now += 700.0
        saved = driver.save(run, 1, order, order)
        driver.report(saved.attempt, loss=float((7 * order) % 31))
    driver.save(run, 1, 31, 31)
    rules = AnyOf(LatestN(2), BestN(3, metric="loss", mode="min"), EveryNumbers(10), EveryHours(2))
    run = driver.open(token="job2", retention=Retention(keep=rules))
    driver.save(run, 1, 1, 32)
    assert not last(driver).state.pages
    return numbers(last(driver).state.active)


def test_rules_judge_what_is_in_pages_as_without():
    assert judged(SIZES) == judged(Sizes(1 << 20, 1 << 20, 1 << 20))
    assert 9 in judged(SIZES)  # 7 * 9 % 31 is 1: one of the best
