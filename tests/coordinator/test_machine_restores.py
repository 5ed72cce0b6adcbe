"""The coordinator's machine, one behaviour a test: restores of all ranks together."""

from __future__ import annotations

from typing import Any, cast

import pytest

from distckpt.coordinator.machine.actions import Append, NewestRead, ReadNewest
from distckpt.coordinator.machine.ledger import LAST_RETRY
from distckpt.coordinator.messages import (
    Accepted,
    FillFrom,
    FinishWith,
    FromRank,
    Heartbeat,
    KeyMatch,
    MatchWith,
    Mismatched,
    OpenRun,
    Pin,
    Restore,
    Restored,
    RunOpened,
    Status,
    StatusReply,
)
from distckpt.errors import (
    CheckpointNotFoundError,
    FencedError,
    MissingRanksError,
    NoGoodCheckpointError,
    RestoreError,
    StaleRunError,
)
from distckpt.format.json.log import Entry, State
from distckpt.keep import Retention
from tests.support.driving import (
    DIRECTORY,
    FITS,
    TIMEOUT,
    Driver,
    attempt_of,
    filled,
    finished,
    matched,
    record,
    refusal,
    reported,
    saved_three,
)


def test_all_ranks_restore_the_newest_and_are_told_when_all_have():
    driver, run, saved = saved_three()
    newest = saved[2].attempt
    for rank in range(2):
        assert driver.answer(FromRank(run, rank, Restore(0, None))) == MatchWith(saved[2])
    for report, then in (
        (matched, FillFrom(saved[2])),
        (filled, FinishWith(saved[2], FITS)),
        (finished, Restored(saved[2])),
    ):
        first = driver.ask(report(run, 0, newest))
        again = driver.ask(report(run, 0, newest))
        assert first not in driver.replies
        assert driver.settled(report(run, 1, newest)) == then
        assert driver.replies[first] == driver.replies[again] == then
        assert driver.answer(report(run, 1, newest)) == then


def test_nobody_fills_before_all_have_matched():
    driver, run, saved = saved_three()
    newest = saved[2].attempt
    for rank in range(2):
        assert driver.answer(filled(run, rank, newest)) == MatchWith(saved[2])
    early = driver.ask(matched(run, 0, newest))
    assert driver.answer(filled(run, 1, newest)) == MatchWith(saved[2])
    assert early not in driver.replies
    assert driver.answer(matched(run, 1, newest)) == driver.replies[early] == FillFrom(saved[2])
    late = driver.answer(matched(run, 0, newest))
    assert late == FillFrom(saved[2]), "a late copy of a report on the stage before says nothing of this one"
    driver.ask(filled(run, 0, newest))
    assert driver.answer(FromRank(run, 1, Restore(0, None))) == FillFrom(saved[2])
    assert driver.answer(filled(run, 1, newest)) == FinishWith(saved[2], FITS)


def test_nobody_finishes_before_all_have_read_all_of_it():
    driver, run, saved = saved_three()
    newest = saved[2].attempt
    for rank in range(2):
        driver.ask(matched(run, rank, newest))
    assert driver.answer(finished(run, 0, newest)) == FillFrom(saved[2])
    early = driver.ask(filled(run, 0, newest))
    assert early not in driver.replies
    assert driver.answer(filled(run, 1, newest)) == driver.replies[early] == FinishWith(saved[2], FITS)
    done = driver.ask(finished(run, 0, newest))
    assert driver.answer(filled(run, 1, newest)) == FinishWith(saved[2], FITS)
    assert done not in driver.replies
    assert driver.settled(finished(run, 1, newest)) == driver.replies[done] == Restored(saved[2])


def test_a_mismatch_on_any_rank_ends_the_restore_for_all_with_what_is_missing_or_does_not_fit_anywhere():
    driver, run, saved = saved_three()
    newest = saved[2].attempt
    waits = driver.ask(matched(run, 0, newest, KeyMatch(b"\xc0", 5, ("a",), (("b", "saved 1"),), 1, 1)))
    verdict = driver.answer(matched(run, 1, newest, KeyMatch(b"\x60", 4, ("c", "a"), (), 70, 0)))
    assert verdict == driver.replies[waits] == Mismatched(saved[2], verdict.keys)
    assert verdict.keys == KeyMatch(b"\x40", 5, ("a", "c"), (("b", "saved 1"),), 70, 1)
    assert driver.answer(matched(run, 0, newest)) == verdict
    assert cast(StatusReply, driver.answer(Status())).waiting == {}


def test_what_one_rank_does_not_claim_another_may():
    driver, run, saved = saved_three()
    driver.ask(matched(run, 0, saved[2].attempt, KeyMatch(b"\xc0", 5)))
    reply = driver.answer(matched(run, 1, saved[2].attempt, KeyMatch(b"\x30", 4)))
    assert reply == FillFrom(saved[2])
    driver.ask(filled(run, 0, saved[2].attempt))
    assert driver.answer(filled(run, 1, saved[2].attempt)) == FinishWith(saved[2], KeyMatch(b"\x00", 5))


def test_a_partial_restore_goes_on_and_tells_all_ranks_what_does_not_match():
    driver, run, saved = saved_three()
    newest, odd = saved[2].attempt, KeyMatch(b"\x80", 1, ("a",), (), 1)
    driver.ask(matched(run, 0, newest, odd, partial=True))
    assert driver.answer(matched(run, 1, newest, odd, partial=True)) == FillFrom(saved[2])
    driver.ask(filled(run, 0, newest, partial=True))
    assert driver.answer(filled(run, 1, newest, partial=True)) == FinishWith(saved[2], odd)
    driver.ask(finished(run, 0, newest, partial=True))
    assert driver.settled(finished(run, 1, newest, partial=True)) == Restored(saved[2])


def test_nothing_in_common_is_a_mismatch_even_if_partial():
    driver, run, saved = saved_three()
    nothing = KeyMatch(b"\x80", 0)
    driver.ask(matched(run, 0, saved[2].attempt, nothing, partial=True))
    reply = driver.answer(matched(run, 1, saved[2].attempt, nothing, partial=True))
    assert reply == Mismatched(saved[2], nothing)


def test_ranks_that_disagree_whether_to_restore_in_part_are_refused():
    driver, run, _ = saved_three()
    driver.answer(FromRank(run, 0, Restore(0, None)))
    for rank, partial in ((1, True), (0, False)):
        error = refusal(driver.answer(FromRank(run, rank, Restore(0, None, partial=partial))))
        assert isinstance(error, RestoreError)
        assert "rank 1 is partial" in str(error)


def test_damage_found_while_filling_makes_all_fall_back_and_match_again():
    driver, run, saved = saved_three()
    for rank in range(2):
        driver.ask(matched(run, rank, saved[2].attempt))
    waits = driver.ask(filled(run, 0, saved[2].attempt))
    reply = driver.answer(filled(run, 1, saved[2].attempt, "shard 0: CRC"))
    refused = ((f"{DIRECTORY}/ckpt-30", "rank 1 (host1): shard 0: CRC"),)
    assert reply == driver.replies[waits] == MatchWith(saved[1], refused)
    driver.ask(matched(run, 0, saved[1].attempt))
    assert driver.answer(matched(run, 1, saved[1].attempt)) == FillFrom(saved[1])
    driver.ask(filled(run, 0, saved[1].attempt))
    assert driver.answer(filled(run, 1, saved[1].attempt)) == FinishWith(saved[1], FITS)
    driver.ask(finished(run, 0, saved[1].attempt))
    assert driver.settled(finished(run, 1, saved[1].attempt)) == Restored(saved[1], refused)


def test_a_partial_restore_that_has_begun_to_fill_does_not_fall_back():
    driver, run, saved = saved_three()
    for rank in range(2):
        driver.ask(matched(run, rank, saved[2].attempt, KeyMatch(b"\x80", 1), partial=True))
    waits = driver.ask(filled(run, 0, saved[2].attempt, partial=True))
    error = refusal(driver.settled(filled(run, 1, saved[2].attempt, "shard 0: CRC", partial=True)))
    assert isinstance(error, NoGoodCheckpointError)
    assert error.spoiled
    assert error.refused == ((f"{DIRECTORY}/ckpt-30", "rank 1 (host1): shard 0: CRC"),)
    assert refusal(driver.replies[waits]) == error


def test_when_none_is_left_it_is_told_whether_anything_was_changed():
    driver, run, saved = saved_three(1)
    for order, reports in enumerate(((), (matched,))):
        for report in reports:
            driver.answer(report(run, 0, saved[0].attempt, which=10, **_nth(order)))
        bad = filled if reports else matched
        error = refusal(driver.settled(bad(run, 0, saved[0].attempt, refused="bad", which=10, **_nth(order))))
        assert isinstance(error, NoGoodCheckpointError)
        assert error.spoiled == bool(reports)


def _nth(order: int) -> dict[str, Any]:
    """Of reports in a rank's restore after so many others, each a round of its own."""
    return {"order": order, "round": f"1-{order + 1}"}


def test_the_choice_stands_though_a_newer_one_is_committed_meanwhile():
    driver, run, saved = saved_three()
    driver.answer(FromRank(run, 0, Restore(0, None)))
    driver.save(run, 2, 4, 40)
    assert driver.answer(FromRank(run, 1, Restore(0, None))) == MatchWith(saved[2])
    assert cast(MatchWith, driver.answer(FromRank(run, 1, Restore(1, None)))).record.number == 40


def test_if_one_rank_refuses_all_fall_back_together():
    driver, run, saved = saved_three()
    waiting = driver.ask(matched(run, 0, saved[2].attempt))
    reply = driver.answer(reported(run, 1, saved[2].attempt, "shard 0: CRC"))
    refused = ((f"{DIRECTORY}/ckpt-30", "rank 1 (host1): shard 0: CRC"),)
    assert reply == MatchWith(saved[1], refused) == driver.replies[waiting]
    late = driver.answer(matched(run, 0, saved[2].attempt))
    assert late == reply
    driver.ask(matched(run, 1, saved[1].attempt))
    assert driver.answer(matched(run, 0, saved[1].attempt)) == FillFrom(saved[1])
    driver.ask(filled(run, 1, saved[1].attempt))
    assert driver.answer(filled(run, 0, saved[1].attempt)) == FinishWith(saved[1], FITS)
    driver.ask(finished(run, 1, saved[1].attempt))
    assert driver.settled(finished(run, 0, saved[1].attempt)) == Restored(saved[1], refused)


def test_fallback_goes_on_to_preserved_ones_but_never_to_retiring_ones():
    preserved, retiring, active = (record(n, attempt_of(1, n)) for n in (1, 2, 3))
    driver = Driver()
    state = State(active=(active,), preserved=(preserved,), retiring=(retiring,), last_preserved_timestamp=0.5)
    driver.log[5] = Entry(1, 5, 1, "retire", 1.0, "c", state)
    driver.leased = frozenset({retiring.attempt})
    run = driver.lead().open()
    assert cast(MatchWith, driver.answer(FromRank(run, 0, Restore(0, None)))).record == active
    reply = driver.answer(reported(run, 0, active.attempt, "bad", round="2-1"))
    assert cast(MatchWith, reply).record == preserved
    error = refusal(driver.settled(reported(run, 0, preserved.attempt, "bad too", round="2-1")))
    assert isinstance(error, NoGoodCheckpointError)
    assert [path for path, _ in error.refused] == [f"{DIRECTORY}/ckpt-3", f"{DIRECTORY}/ckpt-1"]


def test_with_no_checkpoint_every_rank_initializes():
    driver = Driver().lead()
    run = driver.open(2)
    waits = driver.ask(FromRank(run, 0, Restore(0, None)))
    driver.save(run, 2, 1, 5)
    assert waits not in driver.replies
    assert driver.settled(FromRank(run, 1, Restore(0, None))) == driver.replies[waits] == Restored(None)


def test_a_number_is_restored_or_refused_without_fallback():
    driver, run, saved = saved_three(1)
    assert driver.answer(FromRank(run, 0, Restore(0, 20))) == MatchWith(saved[1])
    error = refusal(driver.settled(reported(run, 0, saved[1].attempt, "bad", which=20)))
    assert isinstance(error, NoGoodCheckpointError)
    assert "bad" in str(error)
    missing = refusal(driver.settled(FromRank(run, 0, Restore(1, 99))))
    assert isinstance(missing, CheckpointNotFoundError)
    assert missing.path == f"{DIRECTORY}/ckpt-99"


def test_ranks_that_ask_for_different_checkpoints_are_refused():
    driver, run, _ = saved_three()
    driver.answer(FromRank(run, 0, Restore(0, None)))
    assert isinstance(refusal(driver.answer(FromRank(run, 1, Restore(0, 20)))), RestoreError)
    assert isinstance(refusal(driver.answer(FromRank(run, 0, Restore(0, None)))), RestoreError)


def test_ranks_missing_from_a_restore_are_named():
    driver, run, saved = saved_three()
    ticket = driver.ask(matched(run, 0, saved[2].attempt))
    driver.wait(TIMEOUT)
    error = refusal(driver.replies[ticket])
    assert isinstance(error, MissingRanksError)
    assert (error.number, error.ranks, error.stage) == (None, (1,), "to restore")


def test_a_rank_that_is_heard_may_take_its_time_to_restore():
    driver, run, saved = saved_three()
    driver.answer(FromRank(run, 1, Restore(0, None)))
    ticket = driver.ask(matched(run, 0, saved[2].attempt))
    for _ in range(6):
        driver.wait(TIMEOUT / 2)
        driver.answer(FromRank(run, 1, Heartbeat()))
    assert ticket not in driver.replies
    driver.wait(TIMEOUT)
    assert refusal(driver.replies[ticket]).ranks == (1,)


# ---- ranks that do not restore alike --------------------------------------------------------------------------------


def _restored_together(driver: Driver, run: int, orders: tuple[int, int]) -> bool:
    """Whether both ranks, which have called so many restores, restore the newest one."""
    asked = [driver.answer(FromRank(run, rank, Restore(order, None))) for rank, order in enumerate(orders)]
    newest, round = (cast(MatchWith, asked[0]).record, cast(MatchWith, asked[0]).round)
    for report in (matched, filled, finished):
        said = [report(run, rank, newest.attempt, order=order, round=round) for rank, order in enumerate(orders)]
        waits = driver.ask(said[0])
        last = driver.settled(said[1])
        assert last == driver.replies[waits]
    return last == Restored(driver.machine.state.active[-1])


def test_after_one_rank_restored_alone_joint_restores_work():
    driver, run, saved = saved_three()
    for order in (1, 2):
        alone = driver.ask(matched(run, 0, saved[2].attempt, order=order, round=f"1-{order}"))
        driver.wait(TIMEOUT)
        assert refusal(driver.replies[alone]).ranks == (1,)
    assert _restored_together(driver, run, (3, 1))
    assert _restored_together(driver, run, (4, 2))


def test_after_one_rank_found_nothing_to_restore_alone_joint_restores_work():
    driver = Driver().lead()
    run = driver.open(2)
    alone = driver.ask(FromRank(run, 1, Restore(1, None)))
    driver.wait(TIMEOUT)
    assert refusal(driver.replies[alone]).ranks == (0,)
    driver.save(run, 2, 1, 5)
    assert _restored_together(driver, run, (1, 2))


def test_after_one_rank_failed_alone_joint_restores_work():
    driver, run, _ = saved_three()
    driver.answer(FromRank(run, 0, Restore(1, None, failed="no room")))
    assert isinstance(driver.answer(FromRank(run, 0, Restore(2, None))), MatchWith)
    assert _restored_together(driver, run, (2, 1))


def test_a_failure_is_told_to_a_rank_that_comes_a_moment_later_and_to_none_that_comes_long_after():
    driver, run, _ = saved_three()
    for order, later in ((1, TIMEOUT / 2), (2, 2 * TIMEOUT)):
        failed = driver.answer(FromRank(run, 0, Restore(order, None, failed="no room")))
        driver.wait(later)
        reply = driver.answer(FromRank(run, 1, Restore(order, None)))
        assert (reply == failed) == (later < TIMEOUT)
    assert _restored_together(driver, run, (3, 2))


def test_a_rank_that_begins_another_restore_has_given_up_the_one_before():
    driver, run, saved = saved_three()
    waits = driver.ask(matched(run, 1, saved[2].attempt, order=1))
    driver.answer(FromRank(run, 0, Restore(1, None)))
    driver.answer(FromRank(run, 0, Restore(2, None)))
    assert "rank 0 (host0) has begun another restore" in str(refusal(driver.replies[waits]))
    late = driver.answer(matched(run, 0, saved[2].attempt, order=0))
    assert "rank 0 has begun a later restore already" in str(refusal(late))
    assert _restored_together(driver, run, (2, 2))


def test_what_came_of_a_restore_is_told_again_though_another_has_begun():
    driver, run, saved = saved_three()
    assert _restored_together(driver, run, (2, 1))
    driver.answer(FromRank(run, 0, Restore(3, None)))
    assert driver.answer(finished(run, 1, saved[2].attempt, order=1)) == Restored(saved[2])


def test_a_report_counts_in_the_round_that_asked_for_it_only():
    """A rank that asks again, because the coordinator was replaced, may have reported to the one before."""
    driver, run, saved = saved_three()
    driver = driver.restarted("b")
    driver.open(2, run=run)
    asked = cast(MatchWith, driver.answer(FromRank(run, 0, Restore(0, None))))
    assert asked.round == "2-1"
    assert driver.answer(matched(run, 0, saved[2].attempt)) == MatchWith(saved[2])
    waits = driver.ask(matched(run, 0, saved[2].attempt, round="2-1"))
    assert driver.answer(matched(run, 1, saved[2].attempt)) == MatchWith(saved[2])
    assert driver.answer(matched(run, 1, saved[2].attempt, round="2-1")) == driver.replies[waits] == FillFrom(saved[2])


# ---- what holds only if the log has nothing newer -------------------------------------------------------------------


def _all_but_finish(driver: Driver, run: int, attempt: str, order: int = 0) -> None:
    for report in (matched, filled):
        driver.answer(report(run, 0, attempt, **_nth(order)))


def test_what_was_restored_is_told_once_the_log_was_looked_at():
    driver, run, saved = saved_three(1)
    _all_but_finish(driver, run, saved[2].attempt)
    waits = driver.ask(finished(run, 0, saved[2].attempt))
    again = driver.ask(finished(run, 0, saved[2].attempt))
    assert driver.take(ReadNewest)
    assert not driver.has(ReadNewest)
    assert {waits, again}.isdisjoint(driver.replies)
    driver.feed(NewestRead(max(driver.log)))
    assert driver.replies[waits] == driver.replies[again] == Restored(saved[2])


@pytest.mark.parametrize("found", [2, 1, 0])
def test_who_was_superseded_while_it_restored_is_told_so(found: int):
    """Whether it has restored the newest that it knows, an older one, or found none that can be read."""
    driver, run, saved = saved_three(1)
    for at in range(2, found - 1, -1):
        if at == found and found:
            _all_but_finish(driver, run, saved[at].attempt)
            reply = driver.ask(finished(run, 0, saved[at].attempt))
        else:
            reply = driver.ask(reported(run, 0, saved[at].attempt, "deleted"))
    driver.restarted("b").open(1, "the next job")
    driver.settle()
    assert isinstance(refusal(driver.replies[reply]), FencedError)


def test_who_finds_nothing_to_restore_but_was_superseded_does_not_initialize():
    driver = Driver().lead()
    run = driver.open()
    reply = driver.ask(FromRank(run, 0, Restore(0, None)))
    driver.restarted("b").open(1, "the next job")
    driver.settle()
    assert isinstance(refusal(driver.replies[reply]), FencedError)


def test_a_look_comes_after_the_entries_that_wait_and_those_that_come_later_wait_for_it():
    driver, run, saved = saved_three(1)
    _all_but_finish(driver, run, saved[2].attempt)
    pins = [driver.ask(Pin(10, True))]
    reply = driver.ask(finished(run, 0, saved[2].attempt))
    pins.append(driver.ask(Pin(20, True)))
    assert not driver.has(ReadNewest)
    driver.perform(driver.take(Append))
    assert not driver.has(Append)
    driver.perform(driver.take(ReadNewest))
    assert driver.replies[reply] == Restored(saved[2])
    driver.perform(driver.take(Append))
    assert [driver.replies[pin] for pin in pins] == [Accepted()] * 2


@pytest.mark.parametrize("newest", [None, 1], ids=["no answer", "a listing that lacks what was written"])
def test_a_look_that_makes_nothing_sure_is_repeated_and_in_the_end_refused(newest: int | None):
    driver, run, saved = saved_three(1)
    for order in (0, 1):
        _all_but_finish(driver, run, saved[2].attempt, order)
        reply = driver.ask(finished(run, 0, saved[2].attempt, **_nth(order)))
        for _ in range(2):
            driver.take(ReadNewest)
            driver.feed(NewestRead(newest, "" if newest else "no route to the store"))
            assert not driver.has(ReadNewest)
            driver.wait(LAST_RETRY)
        if order:
            driver.wait(TIMEOUT)
            error = refusal(driver.replies[reply])
            assert isinstance(error, RestoreError)
            assert ("no entry after 1" if newest else "no route to the store") in str(error)
            driver.settle()
            assert driver.save(run, 1, 4, 40).number == 40
        else:
            driver.settle()
            assert driver.replies[reply] == Restored(saved[2])


def test_a_run_that_begins_while_the_log_is_looked_at_ends_the_restore():
    driver, run, saved = saved_three(1)
    _all_but_finish(driver, run, saved[2].attempt)
    reply = driver.ask(finished(run, 0, saved[2].attempt))
    look = driver.take(ReadNewest)
    opened = driver.ask(OpenRun("the next job", 0, 1, "host0", "ckpt", Retention(), TIMEOUT))
    driver.perform(look)
    assert driver.replies[reply] == Restored(saved[2]), "it had not begun yet"
    driver.settle()
    assert isinstance(driver.replies[opened], RunOpened)
    assert isinstance(refusal(driver.answer(FromRank(run, 0, Restore(1, None)))), StaleRunError)
