"""The coordinator's machine, one behaviour a test: retention and restores."""

from __future__ import annotations

from typing import cast

import msgspec

from distckpt.coordinator.machine.actions import (
    Append,
    CollectGarbage,
    Delete,
    Deleted,
    Exit,
    LeasesRead,
    Publish,
    ReadLeases,
    ReadTail,
    RoomMade,
    Seal,
    StepFailed,
    TailRead,
    Tick,
)
from distckpt.coordinator.machine.retention import recover
from distckpt.coordinator.messages import (
    Accepted,
    Committed,
    FromRank,
    Joined,
    Leave,
    MakeRoom,
    MatchWith,
    Pin,
    Restore,
    RunOpened,
)
from distckpt.errors import (
    CheckpointNotFoundError,
    SaveError,
)
from distckpt.keep import Retention
from tests.support.driving import (
    DIRECTORY,
    TIMEOUT,
    Driver,
    filled,
    finished,
    kinds,
    last,
    matched,
    refusal,
)

# ---- retention -------------------------------------------------------------------------------------------------------


def saving(driver: Driver, keep: int, hours: float | None = None) -> int:
    return driver.open(retention=Retention(keep, hours))


def test_retire_is_logged_before_anything_is_deleted_and_forgotten_after():
    driver = Driver().lead()
    run = saving(driver, 1)
    old, new = driver.save(run, 1, 1, 1), driver.save(run, 1, 2, 2)
    assert kinds(driver) == ["claim", "run", "commit", "commit", "forget"]
    assert driver.machine.state.active == (new,)
    order = [type(action) for action in driver.done if not isinstance(action, Publish | CollectGarbage)]
    assert order[-6:] == [ReadLeases, Seal, Append, ReadLeases, Delete, Append]
    assert Delete((old,)) in driver.done
    assert driver.machine.state.retiring == ()


def test_trace_a_through_the_machine():
    driver = Driver()
    driver.now = 3.0
    driver.lead()
    saves = iter(range(1, 9))

    def save(at: float) -> None:
        driver.now = at
        order = next(saves)
        driver.save(driver.machine.state.run, 1, order, order)

    saving(driver, 2)
    save(10000.0)
    save(13610.0)
    driver = driver.restarted("b")
    driver.open(retention=Retention(2, 1.5), run=1)
    for at in (14330.0, 16130.0, 17930.0):
        save(at)
    assert driver.machine.state.last_preserved_timestamp == 10000.0
    driver = driver.restarted("c")
    driver.open(retention=Retention(2, 1.5), run=1)
    save(17940.0)
    state = driver.machine.state
    assert [one.number for one in state.active] == [5, 6]
    assert [one.number for one in state.preserved] == [1, 4]
    assert state.last_preserved_timestamp == 16130.0


def test_trace_b_through_the_machine():
    driver = Driver()
    driver.now = 9999.0
    driver.lead()
    run = saving(driver, 1, 1.0)
    for order, at in enumerate((10000.0, 13600.0, 17200.0), 1):
        driver.now = at
        driver.save(run, 1, order, order)
    driver.now = 5000.0
    run = driver.open(token="job2", retention=Retention(1))
    opened = list(driver.replies.values())[-1]
    assert opened == RunOpened(run, 1, 5000.0, driver.machine.state.origin)
    assert recover(driver.machine.state, 5000.0).active == ()
    reply = driver.answer(FromRank(run, 0, Restore(0, None)))
    assert cast(MatchWith, reply).record.number == 3
    for report in (matched, filled, finished):
        driver.answer(report(run, 0, reply.record.attempt))
    for order, at in enumerate((5010.0, 5020.0), 1):
        driver.now = at
        driver.save(run, 1, order, order + 3)
    state = driver.machine.state
    assert [(one.number, one.time) for one in state.active] == [(5, 5020.0)]
    assert [one.number for one in state.preserved] == [2, 3]
    assert state.last_preserved_timestamp == 5000.0


def test_a_clock_that_was_wrong_while_nothing_was_saved_leaves_no_trace():
    driver = Driver().lead()
    run = saving(driver, 2)
    for order in (1, 2):
        driver.wait(10.0)
        driver.save(run, 1, order, order)
    before = driver.machine.state
    driver.now -= 90000.0
    driver.open(token="job2", retention=Retention(1))
    driver = driver.restarted("b")
    driver.now += 90100.0
    run = driver.open(token="job3", retention=Retention(2))
    assert driver.machine.state == msgspec.structs.replace(before, run=3, run_token="job3", saves=0)
    driver.save(run, 1, 1, 3)
    state = driver.machine.state
    assert [one.number for one in state.active] == [2, 3]
    assert (state.preserved, state.last_preserved_timestamp) == ((), before.last_preserved_timestamp)


def test_nothing_is_preserved_for_the_time_before_the_first_save():
    """A run that ended before it saved: the next one counts its hours from its own beginning."""
    driver = Driver().lead()
    saving(driver, 1, 1.0)
    driver = driver.restarted("b")
    driver.now += 90000.0
    run = driver.open(token="job2", retention=Retention(1, 1.0))
    began = driver.now
    for order in (1, 2):
        driver.wait(1.0)
        driver.save(run, 1, order, order)
    state = driver.machine.state
    assert ([one.number for one in state.active], state.preserved) == ([2], ())
    assert state.last_preserved_timestamp == began - 1.0


def test_a_new_run_retires_nothing_before_its_first_save():
    """Not even while it looks after what the last run had not deleted yet."""
    driver = Driver().lead()
    run = saving(driver, 3)
    for order in (1, 2, 3):
        driver.save(run, 1, order, order)
    driver.land(run, driver.plan(run, 1, 4, 4))
    driver.settle(Delete)
    active, retiring = driver.machine.state.active, driver.machine.state.retiring
    assert [one.number for one in active] == [2, 3, 4]
    driver = Driver(driver.log, "b")
    driver.leased = frozenset({retiring[0].attempt})
    driver.lead()
    run = driver.open(token="job2", retention=Retention(1))
    driver.wait(90.0)
    driver.settle()
    assert driver.machine.state.active == active
    driver.leased = frozenset()
    new = driver.save(run, 1, 1, 5)
    assert driver.machine.state.active == (new,)


def test_a_leased_checkpoint_stays_until_its_lease_is_gone():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.leased = frozenset({old.attempt})
    new = driver.save(run, 1, 2, 2)
    assert driver.machine.state.active == (old, new)
    driver.wait(30.0)
    driver.settle()
    assert driver.machine.state.active == (old, new)
    driver.leased = frozenset()
    driver.wait(30.0)
    driver.settle()
    assert driver.machine.state.active == (new,)
    assert driver.machine.next_deadline() > driver.mono + 30.0


def test_a_lease_taken_while_the_retirement_was_being_logged_holds_the_objects():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(ReadLeases)
    driver.perform(driver.take(ReadLeases))
    driver.leased = frozenset({old.attempt})
    driver.settle()
    assert driver.machine.state.retiring == (old,)
    assert not any(isinstance(action, Delete) for action in driver.done)
    driver.leased = frozenset()
    driver.wait(30.0)
    driver.settle()
    assert driver.machine.state.retiring == ()


def test_leases_read_before_a_retirement_free_nothing_that_retired_since():
    driver = Driver().lead()
    run = driver.open()
    driver.land(run, driver.plan(run, 1, 1, 5))
    reading, sealing = driver.take(ReadLeases), driver.take(Seal)
    driver.feed(StepFailed(sealing.attempt, SaveError(5, "no answer")))
    driver.settle()
    assert [one.attempt for one in driver.machine.state.retiring] == [sealing.attempt]
    driver.perform(reading)
    assert not driver.has(Delete)
    driver.settle()
    assert driver.machine.state.retiring == ()


def test_a_commit_waits_for_leases_that_are_being_read_so_the_same_entry_retires():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    [ticket] = driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(ReadLeases)
    assert driver.machine.state.active == (old,)
    assert ticket not in driver.replies
    driver.perform(driver.take(ReadLeases))
    driver.settle(ReadLeases)
    assert kinds(driver)[-2:] == ["commit", "commit"]
    assert [one.number for one in driver.machine.state.active] == [2]
    assert cast(Committed, driver.replies[ticket]).record.number == 2


def test_a_commit_does_not_wait_long_for_leases_and_what_is_due_retires_later():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(ReadLeases)
    reading = driver.take(ReadLeases)
    assert driver.machine.next_deadline() == driver.mono + 5.0
    driver.wait(5.0)
    driver.settle()
    assert [one.number for one in driver.machine.state.active] == [1, 2]
    driver.perform(reading)
    driver.settle()
    assert [one.number for one in driver.machine.state.active] == [2]
    assert Delete((old,)) in driver.done


def test_a_coordinator_that_every_rank_has_left_stays_for_what_is_to_be_deleted_later():
    driver = Driver(idle_timeout=600.0).lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.leased = frozenset({old.attempt})
    driver.save(run, 1, 2, 2)
    driver.answer(FromRank(run, 0, Leave()))
    driver.leased = frozenset()
    driver.wait(30.0)
    driver.settle()
    assert Delete((old,)) in driver.done
    assert Exit("idle") in driver.done


def test_a_commit_waits_for_no_deletion_and_retires_all_the_same():
    driver = Driver().lead()
    run = saving(driver, 1)
    driver.save(run, 1, 1, 1)
    planned = {order: driver.plan(run, 1, order, order) for order in (2, 3)}
    for order in (2, 3):
        driver.land(run, planned[order])
        driver.settle(Delete)
        assert [one.number for one in driver.machine.state.active] == [order]
    assert [one.number for one in driver.machine.state.retiring] == [1, 2]
    driver.settle()
    assert driver.machine.state.retiring == ()


def test_unreadable_leases_retire_nothing_and_are_read_again():
    driver = Driver().lead()
    run = saving(driver, 1)
    driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    for _ in ("before the commit", "after it"):
        driver.settle(ReadLeases)
        driver.take(ReadLeases)
        driver.feed(LeasesRead(frozenset(), "timeout"))
    driver.settle()
    assert len(driver.machine.state.active) == 2
    driver.wait(30.0)
    driver.settle()
    assert len(driver.machine.state.active) == 1


def test_what_cannot_be_deleted_stays_retiring_and_is_tried_again():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(Delete)
    driver.take(Delete)
    driver.feed(Deleted(()))
    driver.settle()
    assert driver.machine.state.retiring == (old,)
    driver.wait(30.0)
    driver.settle()
    assert driver.machine.state.retiring == ()


def test_answers_to_deletions_that_nobody_asked_for_change_nothing():
    driver = Driver().lead()
    run = saving(driver, 5)
    saved = driver.save(run, 1, 1, 1)
    driver.feed(Deleted((saved.attempt,)))
    driver.feed(LeasesRead(frozenset()))
    driver.settle()
    assert driver.machine.state.active == (saved,)


def test_what_was_pinned_after_the_leases_were_read_comes_back_and_is_not_deleted():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(Delete, ReadLeases)
    while driver.machine.state.retiring == ():
        driver.take(ReadLeases)
        driver.feed(LeasesRead(frozenset()))
        driver.settle(Delete, ReadLeases)
    driver.take(ReadLeases)
    driver.feed(LeasesRead(frozenset({old.attempt}), "", frozenset({old.attempt})))
    driver.settle()
    assert last(driver).kind == "pin"
    assert (driver.machine.state.preserved, driver.machine.state.retiring) == ((old,), ())
    assert not any(isinstance(action, Delete) for action in driver.done)


def test_what_a_reader_has_leased_does_not_come_back():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.land(run, driver.plan(run, 1, 2, 2))
    driver.settle(ReadLeases)
    driver.take(ReadLeases)
    driver.feed(LeasesRead(frozenset()))
    driver.leased = frozenset({old.attempt})
    driver.settle()
    assert driver.machine.state.retiring == (old,)


def test_a_pinned_checkpoint_stays_and_goes_once_it_is_unpinned():
    driver = Driver().lead()
    run = saving(driver, 1)
    driver.save(run, 1, 1, 1)
    assert driver.settled(Pin(1, True)) == Accepted()
    assert last(driver).kind == "pin"
    driver.save(run, 1, 2, 2)
    assert [one.number for one in driver.machine.state.active] == [1, 2]
    assert driver.settled(Pin(1, False)) == Accepted()
    assert [one.number for one in driver.machine.state.active] == [2]


def test_pinning_twice_appends_once_and_pinning_nothing_is_refused():
    driver = Driver().lead()
    run = saving(driver, 3)
    driver.save(run, 1, 1, 1)
    driver.settled(Pin(1, True))
    length = len(driver.log)
    assert driver.settled(Pin(1, True)) == Accepted()
    assert len(driver.log) == length
    error = refusal(driver.settled(Pin(9, True)))
    assert isinstance(error, CheckpointNotFoundError)
    assert error.path == f"{DIRECTORY}/ckpt-9"


def test_nothing_retires_before_the_settings_of_the_run_are_known():
    driver = Driver().lead()
    run = saving(driver, 3)
    for order in range(1, 4):
        driver.save(run, 1, order, order)
    other = driver.restarted("b")
    other.settled(Pin(2, True))
    other.settled(Pin(2, False))
    assert len(other.machine.state.active) == 3


def test_garbage_is_collected_when_the_run_is_known_and_every_ten_minutes():
    driver = Driver().lead()
    driver.settle()
    assert not any(isinstance(action, CollectGarbage) for action in driver.done)
    run = driver.open()
    saved = driver.save(run, 1, 1, 1)
    driver.plan(run, 1, 2, 2)
    collections = [action for action in driver.done if isinstance(action, CollectGarbage)]
    assert len(collections) == 1
    driver.wait(29.0)
    driver.join(run, 0, 3, 3)
    driver.wait(571.0)
    later = driver.take(CollectGarbage)
    assert (later.name, later.epoch, later.known) == ("ckpt", 1, {saved.attempt})


def test_attempts_that_were_being_sealed_are_not_called_garbage_in_their_own_epoch():
    driver = Driver().lead()
    run = driver.open()
    driver.land(run, driver.plan(run, 1, 1, 5))
    driver.feed(StepFailed(driver.take(Seal).attempt, SaveError(5, "no answer")))
    assert driver.take(CollectGarbage).failed == frozenset()


def test_who_needs_room_is_answered_once_garbage_of_any_age_is_gone():
    driver = Driver().lead()
    run = driver.open(3)
    joined = cast(Joined, driver.join(run, 0, 1, 5))
    driver.wait(TIMEOUT)
    driver.settle()
    live = cast(Joined, driver.join(run, 0, 2, 6)).attempt
    tickets = [driver.ask(FromRank(run, rank, MakeRoom())) for rank in range(2)]
    collection = driver.take(CollectGarbage)
    assert collection.urgent
    assert (collection.failed, collection.live, collection.epoch) == ({joined.attempt}, {live}, 1)
    late = driver.ask(FromRank(run, 2, MakeRoom()))
    assert not driver.has(CollectGarbage)
    driver.feed(RoomMade())
    assert [driver.replies.get(ticket) for ticket in (*tickets, late)] == [Accepted(), None, None]
    assert driver.take(CollectGarbage).urgent
    driver.feed(RoomMade())
    assert [driver.replies.get(ticket) for ticket in (*tickets, late)] == [Accepted(), Accepted(), Accepted()]


def test_nothing_is_deleted_to_make_room_when_entries_of_the_log_cannot_be_read():
    driver = Driver().lead()
    driver.open()
    other = Driver(driver.log, "b")
    other.feed(Tick())
    newest = max(driver.log)
    other.take(ReadTail)
    other.feed(TailRead(newest + 1, driver.log[newest]))
    other.settle()
    run = other.open()
    assert other.answer(FromRank(run, 0, MakeRoom())) == Accepted()
    assert not any(isinstance(action, CollectGarbage) for action in (*other.pending, *other.done))


# ---- what is being restored -------------------------------------------------------------------------------------------


def test_what_is_being_restored_is_spared_by_retention_until_it_is_done():
    driver = Driver().lead()
    run = saving(driver, 1)
    old = driver.save(run, 1, 1, 1)
    driver.answer(FromRank(run, 0, Restore(0, 1)))
    new = driver.save(run, 1, 2, 2)
    assert driver.machine.state.active == (old, new)
    driver.answer(matched(run, 0, old.attempt, which=1))
    driver.wait(TIMEOUT - 1.0)
    driver.settle()
    assert driver.machine.state.active == (old, new)
    driver.answer(filled(run, 0, old.attempt, which=1))
    driver.answer(finished(run, 0, old.attempt, which=1))
    driver.wait(30.0)
    driver.settle()
    assert driver.machine.state.active == (new,)


def test_what_is_being_restored_is_not_deleted_though_its_number_was_saved_again():
    driver = Driver().lead()
    run = saving(driver, 3)
    old = driver.save(run, 1, 1, 1)
    driver.answer(FromRank(run, 0, Restore(0, 1)))
    driver.save(run, 1, 2, 1)
    assert driver.machine.state.retiring == (old,)
    assert not any(isinstance(action, Delete) for action in driver.done)
