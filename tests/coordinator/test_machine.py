"""The coordinator's machine, one behaviour a test: the log, runs, and what belongs to no other part."""

from __future__ import annotations

import ast
import inspect
import sys
import time
from pathlib import Path
from typing import cast

import pytest
from msgspec import structs

from distckpt import keep
from distckpt.coordinator.machine import machine as machine_module
from distckpt.coordinator.machine.actions import (
    Append,
    Appended,
    AppendUnknown,
    Asked,
    CollectGarbage,
    Delete,
    Exit,
    Forgotten,
    NameTaken,
    PlanMade,
    Publish,
    ReadTail,
    Seal,
    Sealed,
    StepFailed,
    TailRead,
    Tick,
)
from distckpt.coordinator.machine.ledger import FIRST_RETRY
from distckpt.coordinator.messages import (
    Accepted,
    AwaitPlan,
    Describe,
    Fail,
    FromRank,
    Heartbeat,
    Join,
    Joined,
    Leave,
    OpenRun,
    Pin,
    Restore,
    RunOpened,
    Status,
    StatusReply,
    Unknown,
)
from distckpt.errors import (
    BlockedError,
    CommitUnknownError,
    CoordinatorError,
    CoordinatorUnavailableError,
    DamagedError,
    DirectoryLostError,
    FencedError,
    RestoreError,
    SaveError,
    StaleRunError,
    StorageError,
)
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.names import attempt_age, entry_path, is_attempt
from distckpt.keep import Retention
from tests.support.driving import (
    DIRECTORY,
    TIMEOUT,
    Driver,
    attempt_of,
    foreign,
    kinds,
    last,
    matched,
    opening,
    receipt,
    record,
    refusal,
    saved_three,
    simulated_plan,
)

OPENING = OpenRun("job", 0, 1, "h", "ckpt", Retention(), TIMEOUT)

# ---- purity ----------------------------------------------------------------------------------------------------------


def test_the_machine_and_its_parts_import_nothing_impure():
    allowed = {
        "__future__", "collections", "dataclasses", "distckpt", "enum", "hashlib", "itertools", "math", "msgspec", "typing",
    }  # fmt: skip
    paths = sorted(Path(inspect.getfile(machine_module)).parent.glob("*.py"))
    assert len(paths) > 10
    paths.append(Path(inspect.getfile(keep)))
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, path
                if node.module.startswith("distckpt.") and node.module != "distckpt.threads.report":
                    assert node.module.split(".")[1] in {"coordinator", "errors", "format", "keep"}, path


def test_the_same_events_give_the_same_actions():
    one, two = Driver(), Driver()
    for driver in (one, two):
        driver.lead()
        run = driver.open(2)
        driver.save(run, 2, 1, 10)
    assert one.log == two.log


def test_ids_are_attempt_ids_and_sort_by_age():
    driver = Driver().lead()
    run = driver.open()
    attempts = [driver.save(run, 1, order, order).attempt for order in range(1, 20)]
    assert all(is_attempt(attempt) for attempt in attempts)
    assert sorted(attempts, key=attempt_age) == attempts
    other = driver.restarted("b")
    run = other.open()
    assert attempt_age(other.save(run, 1, 20, 20).attempt) > attempt_age(attempts[-1])


# ---- claiming --------------------------------------------------------------------------------------------------------


def test_the_first_step_reads_the_tail_and_claims_epoch_one_of_a_fresh_directory():
    driver = Driver()
    driver.feed(Tick())
    driver.take(ReadTail)
    driver.feed(TailRead(0, None))
    entry = driver.take(Append).entry
    assert (entry.seq, entry.epoch, entry.kind) == (1, 1, "claim")
    assert entry.state == State(last_preserved_timestamp=driver.now - 1.0, origin=entry.state.origin)
    assert entry.state.origin


def test_the_next_coordinator_claims_the_next_epoch_with_the_whole_state():
    driver = Driver().lead()
    run = driver.open()
    driver.save(run, 1, 1, 7)
    other = driver.restarted("b")
    assert (other.machine.epoch, last(other).kind) == (2, "claim")
    assert other.machine.state == driver.machine.state


def test_requests_before_the_claim_are_served_after_it():
    driver = Driver()
    status = driver.ask(Status())
    opened = driver.ask(OpenRun("job", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    assert driver.replies == {}
    driver.settle()
    assert cast(StatusReply, driver.replies[status]).epoch == 1
    assert cast(RunOpened, driver.replies[opened]).run == 1


def test_a_claim_that_finds_another_entry_reads_the_tail_again():
    driver = Driver()
    driver.feed(Tick())
    driver.take(ReadTail)
    driver.feed(TailRead(0, None))
    entry = driver.take(Append).entry
    rival = foreign(entry, 1)
    driver.feed(NameTaken(entry, rival, 1))
    driver.take(ReadTail)
    driver.feed(TailRead(1, rival))
    again = driver.take(Append).entry
    assert (again.seq, again.epoch) == (2, 2)
    assert again.commit_id != entry.commit_id


def test_a_lost_acknowledgement_of_the_claim_is_a_win():
    driver = Driver()
    driver.feed(Tick())
    driver.take(ReadTail)
    driver.feed(TailRead(0, None))
    entry = driver.take(Append).entry
    driver.feed(NameTaken(entry, entry, 1))
    assert driver.machine.leading


def test_a_claim_below_the_newest_number_does_not_count():
    driver = Driver()
    driver.feed(Tick())
    driver.take(ReadTail)
    driver.feed(TailRead(0, None))
    entry = driver.take(Append).entry
    driver.feed(Appended(entry, 50))
    assert not driver.machine.leading
    assert driver.has(Exit)


def test_unreadable_newest_entries_raise_the_epoch_and_stop_garbage_collection():
    driver = Driver()
    driver.feed(Tick())
    driver.take(ReadTail)
    entry = Entry(1, 7, 3, "commit", 1.0, "c", State())
    driver.feed(TailRead(9, entry))
    claim = driver.take(Append)
    assert (claim.entry.seq, claim.entry.epoch) == (10, 6)
    driver.perform(claim)
    driver.open()
    assert not any(isinstance(action, CollectGarbage) for action in driver.done)


def test_a_log_without_any_readable_entry_is_not_claimed():
    driver = Driver()
    ticket = driver.ask(Status())
    driver.take(ReadTail)
    driver.feed(TailRead(4, None))
    assert isinstance(refusal(driver.replies[ticket]), DamagedError)
    assert not driver.has(Append)
    driver.take(Exit)


def test_leading_publishes_and_deletes_what_was_retiring():
    driver = Driver()
    retiring = record(3, attempt_of(1, 1))
    driver.log[5] = Entry(1, 5, 1, "retire", 1.0, "c", State(retiring=(retiring,)))
    driver.lead()
    assert Delete((retiring,)) in driver.done
    assert kinds(driver) == ["retire", "claim", "forget"]
    assert driver.machine.state.retiring == ()
    assert any(isinstance(action, Publish) for action in driver.done)


# ---- rolling forward -------------------------------------------------------------------------------------------------


def claimed(state: State, *complete: CheckpointRecord) -> State:
    driver = Driver()
    driver.log[5] = Entry(1, 5, 2, "commit", 1.0, "c", state)
    driver.complete = complete
    driver.lead()
    return driver.log[6].state


def test_a_complete_attempt_is_rolled_forward_by_the_claim():
    old, new = record(1, attempt_of(2, 1)), record(2, attempt_of(2, 2))
    assert claimed(State(active=(old,), commits=1), new).active == (old, structs.replace(new, order=2))


def test_rolling_forward_follows_age_and_replaces_the_same_number():
    old = record(1, attempt_of(2, 1))
    first, second = record(9, attempt_of(2, 2), 900.0), record(1, attempt_of(2, 3), 5.0)
    state = claimed(State(active=(old,)), second, first)
    first, second = structs.replace(first, order=1), structs.replace(second, order=2)
    assert (state.active, state.retiring) == ((first, second), (old,))


def test_a_save_that_was_passed_over_does_not_come_back():
    passed, newest = record(1, attempt_of(2, 1), 900.0), record(2, attempt_of(2, 2), 100.0)
    assert claimed(State(active=(newest,)), passed).active == (newest,)


def test_what_is_retiring_does_not_come_back():
    gone = record(1, attempt_of(2, 9))
    assert gone not in claimed(State(retiring=(gone,)), gone).active


# ---- appending -------------------------------------------------------------------------------------------------------


def test_one_append_is_in_flight_and_each_is_built_from_the_state_at_that_moment():
    driver = Driver().lead()
    first, entry = opening(driver)
    second = driver.ask(OpenRun("job2", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    assert not driver.has(Append)
    driver.perform(Append(entry))
    follower = driver.take(Append).entry
    assert (follower.seq, follower.state.run) == (entry.seq + 1, 2)
    driver.perform(Append(follower))
    assert cast(RunOpened, driver.replies[first]).run == 1
    assert cast(RunOpened, driver.replies[second]).run == 2


def test_an_append_below_the_newest_number_fences():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.feed(Appended(entry, entry.seq + 1))
    assert isinstance(refusal(driver.replies[ticket]), FencedError)
    assert driver.take(Exit).reason.startswith("FencedError")


def test_a_foreign_entry_at_our_number_fences_for_ever():
    driver = Driver().lead()
    driver.open()
    ticket, entry = opening(driver, "other")
    held = driver.ask(Pin(1, True))
    driver.feed(NameTaken(entry, foreign(entry, 9), entry.seq))
    error = refusal(driver.replies[ticket])
    assert isinstance(error, FencedError)
    assert (error.epoch, error.newer, error.directory) == (1, 9, DIRECTORY)
    assert held in driver.replies
    for request in (Status(), FromRank(1, 0, Heartbeat()), OpenRun("t", 0, 1, "h", "ckpt", Retention(), TIMEOUT)):
        assert isinstance(refusal(driver.answer(request)), FencedError)
    driver.feed(Appended(entry, entry.seq))
    assert driver.machine.next_deadline() is None


def test_an_unreadable_entry_at_our_number_fences():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.feed(NameTaken(entry, None, entry.seq))
    assert isinstance(refusal(driver.replies[ticket]), FencedError)


def test_a_lost_acknowledgement_is_a_win():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.feed(NameTaken(entry, entry, entry.seq))
    assert cast(RunOpened, driver.replies[ticket]).run == 1


def test_a_lost_acknowledgement_below_the_newest_number_is_none():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.feed(NameTaken(entry, entry, entry.seq + 3))
    assert isinstance(refusal(driver.replies[ticket]), FencedError)


def test_after_an_unknown_outcome_the_same_entry_is_appended_again_and_nothing_else():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.ask(OpenRun("another", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    for _ in range(4):
        driver.feed(AppendUnknown(entry, "timeout"))
        assert driver.pending == []
        driver.wait(driver.machine.next_deadline() - driver.mono)
        assert driver.take(Append).entry is entry
    driver.feed(NameTaken(entry, entry, entry.seq))
    assert cast(RunOpened, driver.replies[ticket]).run == 1


@pytest.mark.parametrize("leading", [False, True])
def test_who_waits_to_be_let_in_hears_why_the_log_cannot_be_written_and_may_ask_again(leading):
    driver = Driver()
    if leading:
        driver.lead()
    ticket = driver.ask(OPENING)
    driver.settle(Append)
    entry = driver.take(Append).entry
    for tried in range(1, machine_module.TRIES + 1):
        assert ticket not in driver.replies
        driver.feed(AppendUnknown(entry, "permission denied"))
        if tried < machine_module.TRIES:
            driver.wait(driver.machine.next_deadline() - driver.mono)
            assert driver.take(Append).entry is entry
    error = refusal(driver.replies[ticket])
    assert type(error) is StorageError
    assert entry_path(entry.seq) in str(error)
    assert "5 times over: permission denied" in str(error)
    again = driver.ask(OPENING)
    driver.wait(driver.machine.next_deadline() - driver.mono)
    driver.settle()
    assert cast(RunOpened, driver.replies[again]).run == 1


@pytest.mark.parametrize("leading", [False, True])
def test_what_is_in_the_way_of_an_entry_is_told_at_once(leading):
    driver = Driver()
    if leading:
        driver.lead()
    tickets = [driver.ask(OPENING), driver.ask(Pin(1, True))]
    driver.settle(Append)
    blocked = BlockedError("_log/1", "a pipe is there")
    driver.feed(AppendUnknown(driver.take(Append).entry, str(blocked), blocked))
    assert [refusal(driver.replies[ticket]) for ticket in tickets] == [blocked, blocked]
    assert driver.machine.next_deadline() is not None


def test_ranks_of_a_save_hear_at_once_what_is_in_the_way_of_its_entry():
    driver = Driver().lead()
    run = driver.open(2)
    tickets = driver.land(run, driver.plan(run, 2, 1, 10))
    driver.settle(Append)
    entry = driver.take(Append).entry
    blocked = BlockedError("_log/3", "a pipe is there")
    driver.feed(AppendUnknown(entry, str(blocked), blocked))
    for ticket in tickets:
        error = refusal(driver.replies[ticket])
        assert type(error) is CommitUnknownError
        assert "a pipe is there" in str(error)
    driver.wait(driver.machine.next_deadline() - driver.mono)
    driver.settle()
    assert [record.number for record in driver.machine.state.active] == [10]


def test_retries_back_off_and_start_over():
    driver = Driver().lead()
    _, entry = opening(driver)
    waits = []
    for _ in range(8):
        driver.feed(AppendUnknown(entry, "timeout"))
        waits.append(driver.machine.next_deadline() - driver.mono)
        driver.wait(waits[-1])
        driver.take(Append)
    assert waits[0] == FIRST_RETRY
    assert waits == sorted(waits)
    assert waits[-1] == 10.0


def test_a_listing_that_does_not_show_our_own_entry_is_no_answer():
    driver = Driver().lead()
    ticket, entry = opening(driver)
    driver.feed(Appended(entry, entry.seq - 1))
    assert ticket not in driver.replies
    driver.wait(1.0)
    assert driver.take(Append).entry is entry


@pytest.mark.parametrize("late", [Appended, NameTaken, AppendUnknown])
def test_late_and_repeated_answers_to_an_append_change_nothing(late):
    driver = Driver().lead()
    _, entry = opening(driver)
    driver.perform(Append(entry))
    _, following = opening(driver, "job2")
    event = {
        Appended: lambda: Appended(entry, entry.seq),
        NameTaken: lambda: NameTaken(entry, foreign(entry, 9), entry.seq + 1),
        AppendUnknown: lambda: AppendUnknown(entry, "late"),
    }[late]()
    driver.feed(event)
    assert driver.machine.state == entry.state
    driver.perform(Append(following))
    assert driver.machine.state.run == 2
    assert not driver.has(Exit)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_new_token_begins_a_run_and_all_its_ranks_share_it():
    driver = Driver().lead()
    assert driver.open(3) == 1
    assert kinds(driver) == ["claim", "run"]
    assert last(driver).state.run_token == "job"


def test_the_same_token_gets_the_same_run_also_after_a_restart():
    driver = Driver().lead()
    assert driver.open(2) == driver.open(2) == 1
    other = driver.restarted("b")
    assert other.open(2, run=1) == other.open(2) == 1
    assert kinds(other) == ["claim", "run", "claim"]


def test_a_new_run_opens_and_hears_when_it_was_made():
    driver = Driver().lead()
    driver.save(driver.open(), 1, 1, 7)
    reply = driver.settled(OpenRun("job2", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    assert reply == RunOpened(2, 1, driver.now, driver.machine.state.origin)


def test_an_older_run_is_refused_everything():
    driver = Driver().lead()
    driver.open()
    driver.open(token="job2")
    for request in (
        FromRank(1, 0, Join(1, 5, "d")), FromRank(1, 0, Describe("a", "d", b"")), FromRank(1, 0, AwaitPlan("a")), receipt(1, 0, "a", 1),
        FromRank(1, 0, Fail("a", "x")), FromRank(1, 0, Restore(0, None)), FromRank(1, 0, Heartbeat()), FromRank(1, 0, Leave()),
    ):  # fmt: skip
        error = refusal(driver.answer(request))
        assert isinstance(error, StaleRunError)
        assert (error.run, error.newer) == (1, 2)


def test_a_superseded_token_does_not_come_back_to_life():
    driver = Driver().lead()
    driver.open()
    driver.open(token="job2")
    reply = driver.settled(OpenRun("job", 0, 1, "h", "ckpt", Retention(), TIMEOUT))
    assert isinstance(refusal(reply), StaleRunError)
    assert driver.machine.state.run == 2


def test_a_superseded_run_that_reports_to_a_new_coordinator_is_stale():
    driver = Driver().lead()
    driver.open()
    driver.open(token="job2")
    other = driver.restarted("b")
    reply = other.settled(OpenRun("job", 0, 1, "h", "ckpt", Retention(), TIMEOUT, run=1))
    assert isinstance(refusal(reply), StaleRunError)


def test_a_run_whose_entry_cannot_be_read_any_more_goes_on_with_all_its_ranks():
    driver = Driver().lead()
    driver.open(2)
    run = driver.open(2, token="job2")
    other = Driver({seq: driver.log[seq] for seq in (1, 2)}, "b")
    other.feed(Tick())
    other.take(ReadTail)
    other.feed(TailRead(3, driver.log[2]))
    other.settle()
    assert other.open(2, token="job2", run=run, ranks=[1]) == run
    assert other.open(2, token="job2", run=run, ranks=[0]) == run
    assert other.save(run, 2, 1, 5).number == 5
    assert isinstance(refusal(other.answer(FromRank(run - 1, 0, Heartbeat()))), StaleRunError)


# ---- another directory ----------------------------------------------------------------------------------------------


def opening_again(driver: Driver, run: int, rank: int = 0, world: int = 1, token: str = "job") -> OpenRun:
    """What a process says to the next coordinator that had been served by this one."""
    origin = driver.machine.state.origin
    return OpenRun(token, rank, world, "host", "ckpt", Retention(), TIMEOUT, run, origin)


@pytest.mark.parametrize("runs", [0, 1, 2, 3])
def test_a_run_whose_directory_is_another_one_now_is_told_so_and_nothing_is_claimed(runs: int):
    """It is empty, or has seen fewer runs, as many, or more."""
    driver = Driver().lead()
    for token in ("job1", "job"):
        run = driver.open(token=token)
    other = Driver(claim="c")
    if runs:
        other.lead()
        for number in range(runs):
            other.open(token=f"other {number}")
    again = Driver(dict(other.log), "b")
    again.leased = frozenset()
    assert again.settled(FromRank(run, 0, Heartbeat())) == Unknown()
    assert not again.pending
    for _ in range(2):
        error = refusal(again.settled(opening_again(driver, run)))
        assert isinstance(error, DirectoryLostError)
        assert (error.run, error.found) == (run, runs)
    assert again.log == other.log
    assert not again.machine.leading
    again.log = driver.log
    reply = again.settled(opening_again(driver, run))
    assert isinstance(reply, RunOpened), "it is back"
    assert reply.run == run


def test_a_new_job_may_begin_where_an_older_one_s_directory_was():
    driver = Driver().lead()
    driver.open(token="job1")
    run = driver.open()
    other = Driver(claim="b")
    lost = other.ask(opening_again(driver, run))
    begins = other.ask(OpenRun("next", 0, 1, "host", "ckpt", Retention(), TIMEOUT))
    other.settle()
    assert isinstance(refusal(other.replies[lost]), DirectoryLostError)
    assert isinstance(other.replies[begins], RunOpened)
    assert other.answer(FromRank(run, 0, Heartbeat())) == Unknown()
    assert isinstance(refusal(other.answer(opening_again(driver, run))), DirectoryLostError)
    assert kinds(other) == ["claim", "run"]


def test_an_older_copy_of_the_directory_is_another_one():
    """It has the name of the log, and knows nothing of the run."""
    driver = Driver().lead()
    driver.open(token="job1")
    copied = dict(driver.log)
    run = driver.open()
    again = Driver(copied, "b")
    assert isinstance(refusal(again.settled(opening_again(driver, run))), DirectoryLostError)


def test_a_superseded_run_does_not_have_the_directory_claimed_again():
    driver = Driver().lead()
    run = driver.open()
    driver.open(token="job2")
    again = Driver(driver.log, "b")
    before = dict(driver.log)
    assert isinstance(refusal(again.settled(opening_again(driver, run))), StaleRunError)
    assert again.log == before


def test_ranks_are_unknown_after_a_restart_until_they_report_again():
    driver = Driver().lead()
    run = driver.open(2)
    other = driver.restarted("b")
    assert other.answer(FromRank(run, 0, Heartbeat())) == Unknown()
    other.open(2, run=run, ranks=[0])
    assert other.answer(FromRank(run, 0, Heartbeat())) == Accepted()
    assert other.answer(FromRank(run, 1, Heartbeat())) == Unknown()
    assert other.answer(FromRank(run + 1, 0, Heartbeat())) == Unknown()


def test_ranks_that_disagree_on_the_world_or_the_name_are_told_so():
    driver = Driver().lead()
    driver.open(2)
    for world, name in ((3, "ckpt"), (2, "model")):
        error = refusal(driver.answer(OpenRun("job", 1, world, "h", name, Retention(), TIMEOUT)))
        assert type(error) is CoordinatorError
        assert "rank 1" in str(error)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank):
    driver = Driver().lead()
    reply = driver.settled(OpenRun("job", rank, 2, "h", "ckpt", Retention(), TIMEOUT))
    assert type(refusal(reply)) is CoordinatorError
    assert driver.machine.state.run == 0


def test_a_new_run_ends_what_the_old_one_had_in_flight():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    save = driver.ask(receipt(run, 0, planned[0][0], len(planned[0][1].rows) // 4))
    restore = driver.ask(FromRank(run, 0, Restore(0, None)))
    driver.open(2, "job2")
    assert isinstance(refusal(driver.replies[save]), StaleRunError)
    assert isinstance(refusal(driver.replies[restore]), StaleRunError)
    assert cast(StatusReply, driver.answer(Status())).waiting == {}


def test_a_restore_that_fails_on_one_rank_fails_for_all():
    driver, run, saved = saved_three()
    waits = driver.ask(matched(run, 0, saved[2].attempt))
    failed = driver.answer(FromRank(run, 1, Restore(0, None, saved[2].attempt, failed="MismatchError: no key 'w'")))
    for reply in (failed, driver.replies[waits]):
        assert isinstance(refusal(reply), RestoreError)
        assert "rank 1" in str(refusal(reply))
        assert "no key 'w'" in str(refusal(reply))
    assert cast(StatusReply, driver.answer(Status())).waiting == {}


def test_a_sealed_save_of_an_old_run_is_not_committed_after_the_new_run():
    driver = Driver().lead()
    run = driver.open()
    tickets = driver.land(run, driver.plan(run, 1, 1, 5))
    seal = driver.take(Seal)
    _, entry = opening(driver, "job2")
    driver.perform(seal)
    driver.perform(Append(entry))
    driver.settle()
    assert isinstance(refusal(driver.replies[tickets[0]]), StaleRunError)
    assert "commit" not in kinds(driver)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_status_says_what_is_there_and_who_is_awaited():
    driver, run, saved = saved_three()
    planned = driver.plan(run, 2, 4, 40)
    driver.land(run, {1: planned[1]})
    driver.answer(FromRank(run, 0, Restore(0, None)))
    status = cast(StatusReply, driver.answer(Status()))
    assert (status.epoch, status.run, status.seq) == (1, 1, max(driver.log))
    assert status.checkpoints == tuple(saved)
    assert status.waiting == {planned[0][0]: (0,), saved[2].attempt: (0, 1)}


def test_a_forgotten_ticket_is_not_answered():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    ticket = driver.land(run, {0: planned[0]})[0]
    driver.feed(Forgotten(ticket))
    driver.feed(Forgotten(ticket))
    driver.land(run, {1: planned[1]})
    driver.settle()
    assert ticket not in driver.replies
    early = Driver()
    ticket = early.ask(Status())
    early.feed(Forgotten(ticket))
    early.lead()
    assert ticket not in early.replies


def test_an_idle_coordinator_stops_but_never_with_work_in_flight():
    driver = Driver(idle_timeout=100.0).lead()
    run = driver.open()
    driver.join(run, 0, 1, 5)
    driver.wait(29.0)
    driver.answer(FromRank(run, 0, Heartbeat()))
    assert driver.machine.next_deadline() == pytest.approx(driver.mono + 1.0)
    driver.wait(1.0)
    driver.settle()
    assert driver.machine.next_deadline() == pytest.approx(driver.mono + 99.0)
    driver.wait(98.0)
    assert not driver.has(Exit)
    driver.wait(1.0)
    assert driver.take(Exit) == Exit("idle")
    assert isinstance(refusal(driver.answer(Status())), CoordinatorUnavailableError)


def test_a_coordinator_that_every_rank_has_left_stops_soon_but_does_what_is_to_be_done_first():
    driver = Driver(idle_timeout=100.0).lead()
    run = driver.open(2, retention=Retention(1))
    driver.save(run, 2, 1, 5)
    driver.land(run, driver.plan(run, 2, 2, 6))
    driver.answer(FromRank(run, 0, Leave()))
    driver.wait(50.0)
    assert not driver.has(Exit), "one rank is left"
    driver.answer(FromRank(run, 1, Leave()))
    driver.wait(50.0)
    assert not driver.has(Exit), "a checkpoint is to be committed, and one to be deleted"
    driver.settle()
    assert driver.done[-1] == Exit("idle")
    assert [one.number for one in driver.machine.state.active] == [6]
    assert driver.machine.state.retiring == ()


def test_a_coordinator_that_every_rank_has_left_serves_a_run_that_begins_at_once():
    driver = Driver(idle_timeout=100.0).lead()
    driver.answer(FromRank(driver.open(), 0, Leave()))
    driver.wait(4.0)
    driver.open(token="next")
    driver.wait(99.0)
    assert not driver.has(Exit)
    driver.wait(1.0)
    assert driver.has(Exit)


def test_an_unfinished_append_keeps_an_idle_coordinator_alive():
    driver = Driver(idle_timeout=5.0).lead()
    _, entry = opening(driver)
    driver.wait(50.0)
    assert not driver.has(Exit)
    driver.perform(Append(entry))
    assert driver.has(Exit)


def test_when_every_rank_has_left_unfinished_saves_end():
    driver = Driver().lead()
    run = driver.open(2)
    planned = driver.plan(run, 2, 1, 5)
    ticket = driver.land(run, {0: planned[0]})[0]
    assert driver.answer(FromRank(run, 0, Leave())) == Accepted()
    assert driver.answer(FromRank(run, 0, Leave())) == Accepted()
    assert ticket not in driver.replies
    driver.answer(FromRank(run, 1, Leave()))
    assert isinstance(refusal(driver.replies[ticket]), SaveError)


def test_a_rank_that_speaks_again_has_not_left():
    driver = Driver().lead()
    run = driver.open(2)
    driver.answer(FromRank(run, 0, Leave()))
    driver.join(run, 0, 1, 5)
    driver.answer(FromRank(run, 1, Leave()))
    assert isinstance(driver.join(run, 1, 1, 5), Joined)


def test_a_sealed_save_is_committed_though_every_rank_has_left():
    driver = Driver().lead()
    run = driver.open()
    driver.land(run, driver.plan(run, 1, 1, 5))
    driver.answer(FromRank(run, 0, Leave()))
    driver.settle()
    assert [one.number for one in driver.machine.state.active] == [5]


def test_late_results_of_actions_change_nothing():
    driver = Driver().lead()
    run = driver.open()
    saved = driver.save(run, 1, 1, 5)
    state = driver.machine.state
    for event in (
        Sealed(saved.attempt, 1, 2, 3),
        PlanMade(saved.attempt, simulated_plan(driver, 1, 3)),
        StepFailed(saved.attempt, SaveError(5, "late")),
        Sealed(attempt_of(1, 99), 1, 2, 3),
        TailRead(0, None),
        TailRead(99, last(driver)),
    ):
        driver.feed(event)
        driver.settle()
    assert driver.machine.state == state
    assert driver.machine.leading


def test_outcomes_of_old_rounds_are_remembered_only_so_long():
    driver = Driver().lead()
    run = driver.open(retention=Retention(1))
    first = driver.save(run, 1, 1, 1)
    for order in range(2, 80):
        driver.save(run, 1, order, order)
    assert driver.answer(receipt(run, 0, first.attempt, 8)) == Unknown()
    assert isinstance(refusal(driver.join(run, 0, 1, 1)), SaveError)


def calls_of(step) -> int:
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("world", [64, 2048])
def test_a_receipt_costs_the_same_in_a_large_world(world):
    driver = Driver().lead()
    run = driver.open(world)
    planned = driver.plan(run, world, 1, 5, chunks=world)
    messages = [receipt(run, rank, attempt, len(plan.rows) // 4) for rank, (attempt, plan) in planned.items()]
    costs = [
        calls_of(lambda ticket=100000 + rank, message=message: driver.feed(Asked(ticket, message)))
        for rank, message in enumerate(messages[:-1])
    ]
    assert max(costs) < 60


def test_two_thousand_ranks_save_within_a_second():
    world = 2048
    driver = Driver().lead()
    run = driver.open(world)
    first = driver.plan(run, world, 1, 5, chunks=world)
    driver.land(run, first)
    driver.settle()
    begun = time.process_time()
    for rank in range(world):
        plan = first[rank][1]
        joined = cast(Joined, driver.join(run, rank, 2, 6, digest=str(world), plan=plan.plan, staged=True))
        driver.ask(receipt(run, rank, joined.attempt, len(plan.rows) // 4))
    driver.settle()
    took = time.process_time() - begun
    assert [one.number for one in driver.machine.state.active] == [5, 6]
    assert took < 5.0, f"{took:.2f} s"
