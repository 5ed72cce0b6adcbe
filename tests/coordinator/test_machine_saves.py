"""The coordinator's machine, one behaviour a test: saves."""

from __future__ import annotations

from typing import cast

import pytest

from distckpt.coordinator.machine.actions import (
    Append,
    AppendUnknown,
    CollectGarbage,
    Delete,
    MakePlan,
    NameTaken,
    PlanMade,
    Publish,
    Seal,
    StepFailed,
    Tick,
)
from distckpt.coordinator.machine.answers import LATE_SHARE
from distckpt.coordinator.messages import (
    Accepted,
    AwaitPlan,
    Committed,
    Describe,
    Fail,
    FromRank,
    Heartbeat,
    Joined,
    Landing,
    Late,
    Pin,
    Planned,
    Prepared,
    Skipped,
    Status,
    StatusReply,
    Unknown,
)
from distckpt.errors import (
    CommitUnknownError,
    MissingRanksError,
    PlanError,
    RankFailedError,
    SaveError,
)
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention
from distckpt.testing.sim_store import describe
from tests.support.driving import (
    TIMEOUT,
    Driver,
    attempt_of,
    kinds,
    receipt,
    record,
    refusal,
    simulated_plan,
)

# ---- saving ----------------------------------------------------------------------------------------------------------


def test_a_save_is_committed_after_every_receipt_and_not_before():
    driver = Driver().lead()
    run = driver.open(3)
    planned = driver.plan(run, 3, 1, 42)
    tickets = [driver.ask(receipt(run, rank, planned[rank][0], len(planned[rank][1].rows) // 4)) for rank in (2, 0)]
    assert not driver.has(Seal)
    tickets += driver.land(run, {1: planned[1]})
    seal = driver.take(Seal)
    assert (seal.number, seal.name, seal.epoch, sorted(seal.receipts)) == (42, "ckpt", 1, [0, 1, 2])
    assert seal.hosts == {0: "host0", 1: "host1", 2: "host2"}
    driver.perform(seal)
    assert not any(ticket in driver.replies for ticket in tickets)
    driver.settle()
    committed = [driver.replies[ticket] for ticket in tickets]
    expected = CheckpointRecord("ckpt", 42, seal.attempt, 11, 12, seal.time, 3, 13, order=1)
    assert committed == [Committed(expected, Landing(1, "host1", 0.0))] * 3
    assert driver.machine.state.active == (expected,)
    assert any(isinstance(action, Publish) and action.entry.kind == "commit" for action in driver.done)


def test_all_ranks_join_one_attempt_and_repeats_get_the_same_answer():
    driver = Driver().lead()
    run = driver.open(2)
    replies = [driver.join(run, rank, 1, 5) for rank in (0, 1, 0, 1)]
    assert len(set(replies)) == 1
    assert isinstance(replies[0], Joined)
    assert replies[0].describe


def test_descriptions_are_asked_for_once():
    driver = Driver().lead()
    run = driver.open(2)
    driver.save(run, 2, 1, 5)
    for rank in range(2):
        assert not cast(Joined, driver.join(run, rank, 2, 6, digest="8")).describe
    assert cast(Joined, driver.join(run, 0, 3, 7, digest="9")).describe


def test_the_second_save_of_the_same_structure_plans_nothing_and_waits_for_nobody():
    driver = Driver().lead()
    run = driver.open(2)
    first = driver.plan(run, 2, 1, 5)
    driver.land(run, first)
    driver.settle()
    plan = first[0][1].plan
    driver.done.clear()
    tickets = []
    for rank in range(2):
        joined = cast(Joined, driver.join(run, rank, 2, 6, digest="8", plan=plan, staged=True))
        assert not joined.describe
        tickets.append(driver.ask(receipt(run, rank, joined.attempt, len(first[rank][1].rows) // 4)))
    driver.settle()
    assert all(isinstance(driver.replies[ticket], Committed) for ticket in tickets)
    assert not any(isinstance(action, MakePlan) for action in driver.done)


def test_a_plan_serves_unstaged_ranks_with_the_same_descriptions_too():
    driver = Driver().lead()
    run = driver.open(2)
    driver.save(run, 2, 1, 5)
    driver.done.clear()
    assert {plan.plan for _, plan in driver.plan(run, 2, 2, 6).values()}
    assert not any(isinstance(action, MakePlan) for action in driver.done)


def test_a_changed_description_is_planned_anew_around_what_others_have_staged():
    driver = Driver().lead()
    run = driver.open(2)
    first = driver.plan(run, 2, 1, 5)
    driver.land(run, first)
    driver.settle()
    staged = cast(Joined, driver.join(run, 0, 2, 6, digest="8", plan=first[0][1].plan, staged=True))
    changed = cast(Joined, driver.join(run, 1, 2, 6, digest="8-again"))
    assert (staged.describe, changed.describe) == (False, True)
    driver.answer(FromRank(run, 1, Describe(changed.attempt, "8-again", describe(8))))
    make = driver.take(MakePlan)
    assert make.staged == {0: first[0][1].rows}
    assert make.descriptions == {0: describe(8), 1: describe(8)}


def test_after_a_restart_a_staged_rank_describes_what_it_copied():
    driver = Driver().lead()
    run = driver.open(2)
    first = driver.plan(run, 2, 1, 5)
    other = driver.restarted("b")
    other.open(2, run=run)
    tickets = []
    for rank in range(2):
        attempt, plan = first[rank]
        joined = cast(Joined, other.join(run, rank, 1, 5, digest="8", plan=plan.plan, staged=True, attempt=attempt))
        assert joined.describe
        assert joined.attempt != attempt
        tickets.append(other.ask(receipt(run, rank, joined.attempt, len(plan.rows) // 4)))
        other.answer(FromRank(run, rank, Describe(joined.attempt, "8", describe(8), plan.rows)))
    make = other.take(MakePlan)
    assert make.staged == {rank: plan.rows for rank, (_, plan) in first.items()}
    other.perform(make)
    other.settle()
    assert all(isinstance(other.replies[ticket], Committed) for ticket in tickets)


def test_a_staged_rank_that_does_not_say_what_it_copied_fails_the_save():
    driver = Driver().lead()
    run = driver.open()
    joined = cast(Joined, driver.join(run, 0, 1, 5, plan="gone", staged=True))
    ticket = driver.ask(receipt(run, 0, joined.attempt, 1))
    driver.answer(FromRank(run, 0, Describe(joined.attempt, "d", describe(2))))
    assert isinstance(refusal(driver.replies[ticket]), RankFailedError)


def test_a_plan_that_wants_other_chunks_than_were_copied_fails_the_save():
    driver = Driver().lead()
    run = driver.open(2)
    attempts = []
    for rank in range(2):
        joined = cast(Joined, driver.join(run, rank, 1, 5, plan="gone", staged=True))
        attempts.append(joined.attempt)
        driver.answer(FromRank(run, rank, Describe(joined.attempt, "d", describe(4), bytes(4 * (rank + 1)))))
    make = driver.take(MakePlan)
    waiting = driver.ask(FromRank(run, 0, AwaitPlan(attempts[0])))
    driver.feed(PlanMade(make.attempt, simulated_plan(driver, 2, 4)))
    assert isinstance(refusal(driver.replies[waiting]), RankFailedError)


def test_a_stale_copy_of_a_join_does_not_unsay_what_was_staged():
    driver = Driver().lead()
    run = driver.open(2)
    first = driver.plan(run, 2, 1, 5)
    driver.land(run, first)
    driver.settle()
    plan = first[0][1]
    driver.join(run, 0, 2, 6, digest="8")
    driver.join(run, 0, 2, 6, digest="8", plan=plan.plan, staged=True)
    driver.join(run, 0, 2, 6, digest="8")
    joined = cast(Joined, driver.join(run, 1, 2, 6, digest="other"))
    driver.answer(FromRank(run, 1, Describe(joined.attempt, "other", describe(8))))
    assert driver.take(MakePlan).staged == {0: plan.rows}


def test_staging_that_comes_too_late_for_the_plan_fails_the_save():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    ticket = driver.ask(receipt(run, 1, planned[1][0], len(planned[1][1].rows) // 4))
    reply = driver.join(run, 0, 1, 5, digest="8", plan="another", staged=True)
    assert isinstance(refusal(reply), RankFailedError)
    assert refusal(driver.replies[ticket]) is refusal(reply)


def test_the_plan_comes_to_those_who_wait_and_to_those_who_ask_again():
    driver = Driver().lead()
    run = driver.open(2)
    joined = [cast(Joined, driver.join(run, rank, 1, 5)) for rank in range(2)]
    early = driver.ask(FromRank(run, 0, AwaitPlan(joined[0].attempt)))
    for rank in range(2):
        driver.answer(FromRank(run, rank, Describe(joined[rank].attempt, "d", describe(6))))
    driver.settle()
    first = cast(Planned, driver.replies[early])
    assert driver.answer(FromRank(run, 0, AwaitPlan(joined[0].attempt))) == first
    assert cast(Planned, driver.answer(FromRank(run, 1, AwaitPlan(joined[1].attempt)))).plan == first.plan


def test_a_failed_plan_fails_the_save_for_all():
    driver = Driver().lead()
    run = driver.open(2)
    joined = [cast(Joined, driver.join(run, rank, 1, 5)) for rank in range(2)]
    for rank in range(2):
        driver.answer(FromRank(run, rank, Describe(joined[rank].attempt, "d", describe(6))))
    tickets = [driver.ask(FromRank(run, rank, AwaitPlan(joined[rank].attempt))) for rank in range(2)]
    error = PlanError(5, "w", [0, 1], "a hole")
    driver.feed(StepFailed(driver.take(MakePlan).attempt, error))
    assert [refusal(driver.replies[ticket]) for ticket in tickets] == [error, error]
    assert refusal(driver.join(run, 0, 1, 5)) is error


def test_a_failed_seal_fails_the_save_and_the_next_one_works():
    driver = Driver().lead()
    run = driver.open()
    tickets = driver.land(run, driver.plan(run, 1, 1, 5))
    error = SaveError(5, "not shared")
    driver.feed(StepFailed(driver.take(Seal).attempt, error))
    assert refusal(driver.replies[tickets[0]]) is error
    driver.save(run, 1, 2, 6)


def test_a_save_that_failed_while_it_was_sealed_is_deleted_and_never_rolled_forward():
    driver = Driver().lead()
    run = driver.open()
    planned = driver.plan(run, 1, 1, 5)
    driver.land(run, planned)
    attempt = driver.take(Seal).attempt
    driver.feed(StepFailed(attempt, SaveError(5, "the answer was lost")))
    driver.settle(Delete)
    (discarded,) = driver.machine.state.retiring
    assert (discarded.attempt, discarded.manifest_size) == (attempt, 0)
    other = Driver(dict(driver.log), "b")
    other.complete = (record(5, attempt),)
    other.lead()
    assert other.machine.state.active == ()
    assert other.answer(receipt(run, 0, attempt, 1)) == Unknown()
    driver.settle()
    assert Delete((discarded,)) in driver.done


def test_a_receipt_with_other_rows_than_planned_names_the_rank():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    reply = driver.answer(receipt(run, 1, planned[1][0], 99))
    error = refusal(reply)
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.host) == (1, "host1")


def test_a_receipt_before_the_plan_is_checked_when_the_plan_comes():
    driver = Driver().lead()
    run = driver.open(2)
    joined = [cast(Joined, driver.join(run, rank, 1, 5)) for rank in range(2)]
    ticket = driver.ask(receipt(run, 0, joined[0].attempt, 99))
    for rank in range(2):
        driver.answer(FromRank(run, rank, Describe(joined[rank].attempt, "d", describe(6))))
    driver.settle()
    assert isinstance(refusal(driver.replies[ticket]), RankFailedError)


def test_receipts_may_come_twice_and_late():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    messages = {rank: receipt(run, rank, attempt, len(plan.rows) // 4) for rank, (attempt, plan) in planned.items()}
    tickets = [driver.ask(messages[rank]) for rank in (0, 0, 1, 0)]
    driver.settle()
    replies = [driver.replies[ticket] for ticket in tickets]
    assert replies == [replies[0]] * 4
    assert isinstance(replies[0], Committed)
    assert driver.answer(messages[1]) == replies[0]
    other, told = driver.restarted("b"), Committed(replies[0].record)
    assert other.answer(messages[0]) == told
    other.open(2, run=run)
    assert other.answer(messages[0]) == told
    assert other.join(run, 0, 1, 5, attempt=planned[0][0]) == told


def test_an_unknown_attempt_is_unknown():
    driver = Driver().lead()
    run = driver.open()
    nobody = attempt_of(1, 999)
    for request in (
        receipt(run, 0, nobody, 1),
        FromRank(run, 0, AwaitPlan(nobody)),
        FromRank(run, 0, Describe(nobody, "d", b"")),
    ):
        assert driver.answer(request) == Unknown()
    assert driver.answer(FromRank(run, 0, Fail(nobody, "x"))) == Unknown()


def test_the_same_number_may_be_saved_again_and_the_old_one_retires():
    driver = Driver().lead()
    run = driver.open()
    old = driver.save(run, 1, 1, 5)
    other = driver.save(run, 1, 2, 6)
    new = driver.save(run, 1, 3, 5)
    assert driver.machine.state.active == (other, new)
    assert Delete((old,)) in driver.done


def test_commits_are_counted_whatever_becomes_of_the_checkpoints():
    driver = Driver().lead()
    run = driver.open()
    orders = [driver.save(run, 1, order, number).order for order, number in enumerate((5, 6, 5), 1)]
    assert (orders, driver.machine.state.commits) == ([1, 2, 3], 3)


def test_a_replaced_checkpoint_that_is_pinned_is_preserved():
    driver = Driver().lead()
    run = driver.open()
    driver.save(run, 1, 1, 5)
    driver.settled(Pin(5, True))
    pinned = driver.machine.state.active[0]
    new = driver.save(run, 1, 2, 5)
    assert (driver.machine.state.active, driver.machine.state.preserved) == ((new,), (pinned,))


# ---- order of saves --------------------------------------------------------------------------------------------------


def test_saves_are_committed_in_order_however_fast_the_later_one_is():
    driver = Driver().lead()
    run = driver.open()
    first, second = driver.plan(run, 1, 1, 10), driver.plan(run, 1, 2, 20)
    later = driver.land(run, second)
    driver.settle()
    assert later[0] not in driver.replies
    driver.land(run, first)
    driver.settle()
    assert [one.number for one in driver.machine.state.active] == [10, 20]
    assert isinstance(driver.replies[later[0]], Committed)


def test_a_failed_save_lets_the_later_one_go_on():
    driver = Driver().lead()
    run = driver.open()
    first, second = driver.plan(run, 1, 1, 10), driver.plan(run, 1, 2, 20)
    later = driver.land(run, second)
    driver.answer(FromRank(run, 0, Fail(first[0][0], "disk full")))
    driver.settle()
    assert cast(Committed, driver.replies[later[0]]).record.number == 20


def test_a_save_that_not_all_joined_is_overtaken_and_never_comes_back():
    driver = Driver().lead()
    run = driver.open(2)
    driver.join(run, 0, 1, 10)
    driver.save(run, 2, 2, 20)
    assert isinstance(refusal(driver.join(run, 0, 1, 10)), SaveError)
    assert isinstance(refusal(driver.join(run, 1, 1, 10)), SaveError)
    other = driver.restarted("b")
    other.open(2, run=run)
    assert isinstance(refusal(other.join(run, 1, 1, 10)), SaveError)
    assert isinstance(other.join(run, 1, 3, 30), Joined)


def test_an_overtaken_save_is_not_sealed_while_the_later_one_commits():
    driver = Driver().lead()
    run = driver.open(2)
    driver.save(run, 2, 1, 5)
    driver.join(run, 0, 2, 10, digest="8")
    driver.joins[run, 1][2] = 10  # rank 1 is busy with it too, and joins it late
    driver.land(run, driver.plan(run, 2, 3, 20))
    sealing = driver.take(Seal)
    joined = cast(Joined, driver.join(run, 1, 2, 10, digest="8"))
    planned = {
        rank: (joined.attempt, driver.answer(FromRank(run, rank, AwaitPlan(joined.attempt)))) for rank in range(2)
    }
    tickets = driver.land(run, planned)
    driver.settle()
    assert not driver.has(Seal)
    driver.perform(sealing)
    driver.settle()
    assert all(isinstance(refusal(driver.replies[ticket]), SaveError) for ticket in tickets)
    assert [one.number for one in driver.machine.state.active] == [5, 20]


def test_a_new_run_counts_its_saves_from_the_start():
    driver = Driver().lead()
    driver.save(driver.open(), 1, 7, 70)
    run = driver.open(token="job2")
    record = driver.save(run, 1, 1, 71)
    assert record.number == 71


# ---- skipping and preparing ------------------------------------------------------------------------------------------


def test_the_first_rank_decides_for_all_whether_to_skip():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    assert driver.join(run, 0, 2, 6, skip_if_busy=True) == Skipped()
    driver.land(run, planned)
    driver.settle()
    assert driver.join(run, 1, 2, 6, skip_if_busy=True) == Skipped()
    assert isinstance(driver.join(run, 1, 3, 7, skip_if_busy=True), Joined)
    driver.join(run, 1, 4, 8)
    assert isinstance(driver.join(run, 0, 3, 7, skip_if_busy=True), Joined)


def test_a_rank_that_has_staged_already_is_not_told_to_skip():
    driver = Driver().lead()
    run = driver.open()
    driver.plan(run, 1, 1, 5)
    assert isinstance(driver.join(run, 0, 2, 6, staged=True, plan="p", skip_if_busy=True), Joined)


def test_a_prepare_ends_with_the_plan():
    driver = Driver().lead()
    run = driver.open(2)
    driver.calm()
    planned = driver.plan(run, 2, 1, None)
    attempt, plan = planned[0]
    assert isinstance(plan, Planned)
    driver.settle()
    assert not any(isinstance(action, Seal) for action in driver.done)
    assert cast(StatusReply, driver.answer(Status())).waiting == {}
    assert driver.answer(FromRank(run, 0, AwaitPlan(attempt))) == plan
    assert driver.join(run, 0, 1, None, digest="8") == Joined(attempt, False)
    assert driver.answer(FromRank(run, 0, Describe(attempt, "8", describe(8)))) == Accepted()
    assert driver.answer(receipt(run, 0, attempt, 0)) == Prepared()
    assert driver.machine.next_deadline() == pytest.approx(driver.mono + 600.0)


# ---- deadlines -------------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_join_in_time_are_named():
    driver = Driver().lead()
    run = driver.open(3)
    joined = cast(Joined, driver.join(run, 1, 1, 5))
    ticket = driver.ask(FromRank(run, 1, AwaitPlan(joined.attempt)))
    driver.wait(TIMEOUT - 0.1)
    assert isinstance(driver.replies[ticket], Late)
    ticket = driver.ask(FromRank(run, 1, AwaitPlan(joined.attempt)))
    assert ticket not in driver.replies
    driver.join(run, 1, 1, 5)
    driver.wait(0.1)
    error = refusal(driver.replies[ticket])
    assert isinstance(error, MissingRanksError)
    assert (error.number, error.ranks, error.hosts) == (5, (0, 1, 2), {0: "host0", 1: "host1", 2: "host2"})
    assert error.stage == "to join the save"
    assert refusal(driver.join(run, 0, 1, 5, age=1.0)) is error


def test_a_rank_that_never_reported_is_named_without_a_host():
    driver = Driver().lead()
    run = driver.open(2, ranks=[0])
    joined = cast(Joined, driver.join(run, 0, 1, 5))
    driver.answer(FromRank(run, 0, Describe(joined.attempt, "d", describe(2))))
    driver.wait(TIMEOUT)
    error = refusal(driver.join(run, 0, 1, 5))
    assert (error.ranks, error.hosts) == ((1,), {})


def test_silence_after_the_plan_fails_the_save_and_repeats_are_silence():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    message = receipt(run, 0, planned[0][0], len(planned[0][1].rows) // 4)
    driver.wait(TIMEOUT / 2)
    ticket = driver.ask(message)
    for _ in range(5):
        driver.wait(TIMEOUT / 6)
        driver.ask(message)
        driver.ask(FromRank(run, 0, AwaitPlan(planned[0][0])))
        driver.ask(FromRank(run, 1, Heartbeat()))
        assert ticket not in driver.replies
    driver.wait(TIMEOUT / 6)
    error = refusal(driver.replies[ticket])
    assert isinstance(error, MissingRanksError)
    assert error.ranks == (1,)
    assert error.stage == "to report that its shards have landed"


def test_each_receipt_gives_the_others_more_time():
    driver = Driver().lead()
    run = driver.open(3)
    planned = driver.plan(run, 3, 1, 5)
    tickets = []
    for rank in range(3):
        driver.wait(TIMEOUT - 1)
        tickets += driver.land(run, {rank: planned[rank]})
    driver.settle()
    assert isinstance(driver.replies[tickets[0]], Late)
    assert all(isinstance(driver.replies[ticket], Committed) for ticket in tickets[1:])


def test_one_of_those_who_wait_hears_who_is_late_once_and_long_before_the_deadline():
    driver = Driver().lead()
    run = driver.open(4)
    planned = driver.plan(run, 4, 1, 5)
    tickets = [driver.land(run, {rank: planned[rank]})[0] for rank in (3, 1)]
    driver.wait(TIMEOUT * LATE_SHARE - 0.1)
    assert not any(ticket in driver.replies for ticket in tickets)
    assert driver.machine.next_deadline() == pytest.approx(driver.mono + 0.1)
    driver.wait(0.1)
    hosts = {0: "host0", 2: "host2"}
    stage = "to report that its shards have landed"
    assert driver.replies[tickets[1]] == Late((0, 2), hosts, pytest.approx(TIMEOUT * LATE_SHARE), TIMEOUT, stage)
    assert tickets[0] not in driver.replies
    again = driver.ask(receipt(run, 1, planned[1][0], len(planned[1][1].rows) // 4))
    driver.wait(TIMEOUT / 2)
    assert again not in driver.replies
    driver.land(run, {2: planned[2]})
    driver.wait(TIMEOUT / 2)
    assert again not in driver.replies, "who is awaited still has been named before"
    last = driver.land(run, {0: planned[0]})
    driver.settle()
    committed = driver.replies[last[0]]
    assert isinstance(committed, Committed)
    assert committed == driver.replies[again] == driver.replies[tickets[0]]
    assert committed.last == Landing(0, "host0", pytest.approx(TIMEOUT * (1 + LATE_SHARE)))


def test_nobody_is_reminded_when_nobody_waits():
    driver = Driver().lead()
    run = driver.open(2)
    driver.calm()
    planned = driver.plan(run, 2, 1, 5)
    driver.wait(TIMEOUT / 2)
    assert driver.machine.next_deadline() == pytest.approx(driver.mono + TIMEOUT / 2)
    late = driver.land(run, {0: planned[0]})[0]
    driver.wait(TIMEOUT * LATE_SHARE)
    assert isinstance(driver.replies[late], Late)


def test_who_saves_is_told_once_what_had_to_make_room():
    driver = Driver().lead()
    run = driver.open(retention=Retention(2))
    told = []
    for number in (1, 2, 3, 4):
        tickets = driver.land(run, driver.plan(run, 1, number, number))
        driver.settle(Delete)
        told.append(cast(Committed, driver.replies[tickets[0]]).retired)
    assert told == [(), (), ("ckpt-1",), ("ckpt-2",)]


def test_planning_and_sealing_are_not_given_up():
    driver = Driver().lead()
    run = driver.open()
    joined = cast(Joined, driver.join(run, 0, 1, 5))
    driver.answer(FromRank(run, 0, Describe(joined.attempt, "d", describe(2))))
    driver.wait(10 * TIMEOUT)
    driver.settle(Seal)
    ticket = driver.ask(receipt(run, 0, joined.attempt, 2))
    driver.wait(10 * TIMEOUT)
    assert ticket not in driver.replies
    driver.settle()
    assert isinstance(driver.replies[ticket], Committed)


def test_wall_clock_jumps_expire_nothing():
    driver = Driver().lead()
    run = driver.open(2)
    driver.join(run, 0, 1, 5)
    for jump in (1e6, -3e6):
        driver.now += jump
        driver.feed(Tick())
    assert isinstance(driver.join(run, 1, 1, 5), Joined)


def test_monotonic_time_that_goes_back_expires_nothing():
    driver = Driver().lead()
    run = driver.open(2)
    driver.calm()
    driver.join(run, 0, 1, 5)
    begun = driver.mono
    driver.mono -= 20.0
    driver.feed(Tick())
    assert driver.machine.next_deadline() == pytest.approx(begun + TIMEOUT)


def test_a_failing_rank_fails_the_save_at_once_for_all():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    waiting = driver.land(run, {0: planned[0]})
    assert driver.answer(FromRank(run, 1, Fail(planned[1][0], "no space left"))) == Accepted()
    error = refusal(driver.replies[waiting[0]])
    assert isinstance(error, RankFailedError)
    assert (error.rank, error.host, error.reason, error.number) == (1, "host1", "no space left", 5)
    assert driver.answer(FromRank(run, 1, Fail(planned[1][0], "no space left"))) == Accepted()


def test_a_save_that_fails_while_its_commit_waits_for_another_entry_is_never_committed():
    driver = Driver().lead()
    run = driver.open()
    driver.save(run, 1, 1, 5)
    planned = driver.plan(run, 1, 2, 6)
    driver.ask(Pin(5, True))
    (ticket,) = driver.land(run, planned)
    driver.settle(Append)
    assert isinstance(refusal(driver.join(run, 0, 2, 7)), SaveError)
    assert isinstance(refusal(driver.replies[ticket]), SaveError)
    driver.settle()
    assert [one.number for one in driver.machine.state.active] == [5]
    assert planned[0][0] not in {attempt for entry in driver.log.values() for attempt in entry.state.alive()}
    assert kinds(driver)[-3:] == ["pin", "retire", "forget"]


def test_a_failure_after_all_shards_have_landed_changes_nothing():
    driver = Driver().lead()
    run = driver.open()
    planned = driver.plan(run, 1, 1, 5)
    tickets = driver.land(run, planned)
    driver.answer(FromRank(run, 0, Fail(planned[0][0], "too late")))
    driver.settle()
    assert isinstance(driver.replies[tickets[0]], Committed)
    assert driver.answer(FromRank(run, 0, Fail(planned[0][0], "too late"))) == Accepted()


def test_a_commit_that_the_store_does_not_confirm_is_unknown_and_may_still_turn_out_well():
    driver = Driver().lead()
    run = driver.open()
    planned = driver.plan(run, 1, 1, 5)
    ticket = driver.land(run, planned)[0]
    driver.settle(Append)
    entry = driver.take(Append).entry
    waited = 0.0
    while waited < TIMEOUT:
        driver.feed(AppendUnknown(entry, "timeout"))
        waited += 10.0
        driver.wait(10.0)
        assert driver.take(Append).entry is entry
    assert isinstance(refusal(driver.replies[ticket]), CommitUnknownError)
    assert not driver.has(Delete)
    again = driver.ask(receipt(run, 0, planned[0][0], len(planned[0][1].rows) // 4))
    assert again not in driver.replies
    driver.feed(NameTaken(entry, entry, entry.seq))
    assert isinstance(driver.replies[again], Committed)
    assert isinstance(driver.join(run, 0, 1, 5, attempt=planned[0][0]), Committed)


def test_a_failed_save_is_forgotten_without_a_trace_and_the_next_succeeds():
    driver = Driver().lead()
    run = driver.open(2)
    attempt = cast(Joined, driver.join(run, 0, 1, 5)).attempt
    driver.wait(TIMEOUT)
    garbage = driver.take(CollectGarbage)
    assert garbage.failed == {attempt}
    assert attempt not in garbage.live | garbage.known
    driver.save(run, 2, 2, 6)


def test_after_a_plan_that_failed_everyone_describes_again():
    """Copies that differ were refused once and then saved, since nobody had described anew and nothing was compared."""
    driver = Driver().lead()
    run = driver.open(2)
    for order in (1, 2):
        joined = [cast(Joined, driver.join(run, rank, order, order)) for rank in range(2)]
        assert [reply.describe for reply in joined] == [True, True]
        for rank in range(2):
            driver.answer(FromRank(run, rank, Describe(joined[rank].attempt, "d", describe(6))))
        making = driver.take(MakePlan)
        assert making.fresh == {0, 1}
        driver.feed(StepFailed(making.attempt, PlanError(order, "w", [0, 1], "copies differ")))


def test_everyone_describes_again_when_one_rank_holds_something_else():
    driver = Driver().lead()
    run = driver.open(2)
    driver.plan(run, 2, 1, None)
    first, second = (
        cast(Joined, driver.join(run, 0, 2, 6, digest="8")),
        cast(Joined, driver.join(run, 1, 2, 6, digest="new")),
    )
    assert (first.describe, second.describe) == (False, True)
    waiting = driver.ask(FromRank(run, 0, AwaitPlan(first.attempt)))
    driver.answer(FromRank(run, 1, Describe(second.attempt, "new", describe(8))))
    assert driver.replies[waiting] == Unknown()
    assert driver.answer(FromRank(run, 0, AwaitPlan(first.attempt))) == Unknown()
    assert cast(Joined, driver.join(run, 0, 2, 6, digest="8")).describe
    driver.answer(FromRank(run, 0, Describe(first.attempt, "8", describe(8))))
    assert driver.take(MakePlan).fresh == {0, 1}


def test_another_run_describes_everything_anew():
    driver = Driver().lead()
    run = driver.open(2)
    driver.plan(run, 2, 1, None)
    assert not cast(Joined, driver.join(run, 0, 2, 6, digest="8")).describe
    again = driver.open(2, "restarted")
    assert cast(Joined, driver.join(again, 0, 1, 6, digest="8")).describe
