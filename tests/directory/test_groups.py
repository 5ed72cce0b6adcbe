from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import pytest

from distckpt.directory import sharing
from distckpt.directory.groups import Group, group_names, read_groups, skip, waiting
from distckpt.directory.log import read_tail
from distckpt.directory.sharing import Offer, Settings
from distckpt.errors import DamagedError, GroupMismatchError, GroupNotFoundError, StoreOutcomeUnknownError
from distckpt.format import names
from distckpt.format.json.group import MAX_SET_ASIDE, Claim, GroupEntry, GroupState
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.sealed import seal, unseal
from distckpt.storage import MemoryStore, Store
from distckpt.testing.faulty import Call, Fault, FaultyStore, RandomFaults
from tests.support.checkpoints import append_state, new_attempt

ALL = Settings(mode="all")


def record(number: int, order: int) -> CheckpointRecord:
    return CheckpointRecord("ckpt", number, new_attempt(), 100, 1, 0.0, 1, 10, order=order)


def log_of(count: int, *, counted: bool = True, commits: int = 0) -> State:
    """The log of a run that has committed so many."""
    records = [record(number, commits + number if counted else 0) for number in range(1, count + 1)]
    return State(active=tuple(records), origin="log-1", commits=commits + count if counted else 0)


def numbers(records: object) -> list[int]:
    return [each.number for each in records]  # type: ignore[attr-defined]


def claim(token: int, seconds: float = 120.0) -> Callable[[Offer], Claim]:
    def make(offered: Offer) -> Claim:
        item = offered.item
        fields = item.order, item.name, item.number, item.attempt
        return Claim(*fields, offered.delivery, offered.failures, "w", f"{token:032x}", seconds, f"{token:032x}")

    return make


def take(state: GroupState, log: State, token: int, dead: tuple[int, ...] = ()) -> tuple[GroupState, Offer]:
    """Claim what is offered."""
    tokens = {f"{each:032x}" for each in dead}
    offered = sharing.offer(state, log, tokens, ())
    assert offered is not None
    return sharing.claimed(state, log, offered, tokens, claim(token)), offered


def settled(state: GroupState | None) -> GroupState:
    """As readers would find it on storage."""
    assert state is not None
    entry = GroupEntry(1, 1, "ack", 0.0, "w", "0" * 32, "", state)
    return unseal(seal(entry), GroupEntry, "x", GroupEntry.MAX_BYTES).state


# ---- who gets what ------------------------------------------------------------------------------------------------


def test_each_is_delivered_in_the_order_of_commits_and_to_one_worker_only() -> None:
    log = log_of(3)
    state, found = sharing.made(ALL, log), []
    for token in range(3):
        state, offered = take(state, log, token)
        found.append(offered.item.number)
    assert found == [1, 2, 3]
    assert sharing.offer(state, log, (), ()) is None
    assert numbers(waiting(state, log)) == [1, 2, 3]
    for token in range(3):
        state = settled(sharing.acknowledged(state, f"{token:032x}"))
    assert (state.acknowledged, sharing.is_done(state, log), state.missed) == (3, True, 0)


def test_what_was_committed_and_given_back_after_a_worker_read_the_log_is_not_missed() -> None:
    log = log_of(3)
    older = msgspec.structs.replace(log, active=log.active[:2], commits=2)
    state, _ = take(sharing.made(ALL, older), older, 0)
    state, _ = take(state, log, 1)
    state, _ = take(state, log, 2)
    for token in (2, 1):
        state = settled(sharing.released(state, f"{token:032x}", 0.0))
    state, offered = take(state, older, 3)
    assert (offered.item.number, state.missed) == (2, 0)
    assert numbers(waiting(state, log)) == [1, 2, 3]


def test_the_newest_is_delivered_once_and_those_before_it_never() -> None:
    log = log_of(3)
    state, offered = take(sharing.made(Settings(mode="latest"), log), log, 1)
    assert offered.item.number == 3
    assert sharing.offer(state, log, (), ()) is None
    assert numbers(waiting(state, log)) == [3]
    assert state.skipped == state.missed == 0


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "of an older log"])
def test_a_group_begins_with_the_oldest_or_with_the_newest(counted: bool) -> None:
    log = log_of(4, counted=counted)
    found = {}
    for start in ("earliest", "latest"):
        state = sharing.made(Settings(mode="all", start=start), log)  # type: ignore[arg-type]
        found[start] = numbers(waiting(settled(state), log))
    assert found == {"earliest": [1, 2, 3, 4], "latest": [4]}


def test_checkpoints_of_logs_that_did_not_count_come_first_each_once() -> None:
    old, new = log_of(2, counted=False), log_of(2)
    log = State(active=(*new.active, *old.active), origin="log-1", commits=2)
    log = msgspec.structs.replace(
        log, active=(*old.active, *(msgspec.structs.replace(each, number=each.number + 2) for each in new.active))
    )
    state, found = sharing.made(ALL, log), []
    for token in range(4):
        state, offered = take(state, log, token)
        state = settled(sharing.acknowledged(state, f"{token:032x}"))
        found.append(offered.item.number)
    assert found == [1, 2, 3, 4]
    assert (sharing.is_done(state, log), state.missed) == (True, 0)


def test_a_dead_claim_is_delivered_again_and_the_old_one_settles_nothing() -> None:
    log = log_of(2)
    state, _ = take(sharing.made(ALL, log), log, 1)
    state, offered = take(state, log, 2, dead=(1,))
    assert (offered.item.number, offered.delivery, offered.failures) == (1, 2, 0)
    assert sharing.acknowledged(state, f"{1:032x}") is None
    assert sharing.released(state, f"{1:032x}", 1.0) is None
    assert sharing.rejected(state, f"{1:032x}", "", 1.0, 0.0) is None
    assert settled(sharing.acknowledged(state, f"{2:032x}")).acknowledged == 1


def test_what_is_released_comes_again_without_blame_and_what_is_rejected_is_set_aside_in_the_end() -> None:
    log = log_of(1)
    state, _ = take(sharing.made(ALL, log), log, 1)
    state = settled(sharing.released(state, f"{1:032x}", 10.0))
    assert sharing.offer(state, log, (), {log.active[0].attempt}) is None, "its back-off is not over"
    for token in (2, 3, 4):
        state, offered = take(state, log, token)
        assert offered.failures == token - 2
        state = settled(sharing.rejected(state, f"{token:032x}", f"error {token} \ud800", 10.0, 1.0))
    assert sharing.is_done(state, log)
    [aside] = state.set_aside
    assert (aside.deliveries, aside.failures, aside.error) == (4, 3, "error 4 ?")
    state = settled(sharing.retried(state, {aside.attempt}))
    _, offered = take(state, log, 5)
    assert (offered.delivery, offered.failures) == (2, 0), "it begins anew"


def given_up_on(state: GroupState, log: State, first: int = 0) -> GroupState:
    """After as many workers as it takes have died on what there is, under tokens from ``first`` on."""
    dead = set[str]()
    for token in range(first, first + 2 * sharing.MAX_DELIVERIES):
        offered = sharing.offer(state, log, dead, ())
        assert offered is not None
        if offered.is_over:
            return settled(sharing.ended(state, log, offered, dead, 1.0))
        state = sharing.claimed(state, log, offered, dead, claim(token))
        dead = {f"{token:032x}"}
    pytest.fail("nobody gives up on it")


def test_what_ends_its_workers_is_set_aside_too() -> None:
    log = log_of(1)
    state = given_up_on(sharing.made(ALL, log), log)
    assert sharing.is_done(state, log)
    [aside] = state.set_aside
    assert (aside.deliveries, aside.error[:18]) == (sharing.MAX_DELIVERIES, "delivered 20 times")


def test_what_ended_its_workers_can_be_tried_again_as_often_as_anything_else() -> None:
    log = log_of(1)
    state = given_up_on(sharing.made(ALL, log), log)
    state = settled(sharing.retried(state, {log.active[0].attempt}))
    state, offered = take(state, log, 99)
    assert not offered.is_over
    assert settled(sharing.acknowledged(state, f"{99:032x}")).acknowledged == 1
    state = settled(sharing.rejected(state, f"{99:032x}", "bad", 0.0, 0.0))
    assert len(given_up_on(state, log, 100).set_aside) == 1


def test_what_is_rejected_is_tried_as_often_as_the_group_wants_and_has_its_own_error() -> None:
    log = log_of(1)
    state = sharing.made(Settings(mode="all", max_attempts=25), log)
    for token in range(25):
        assert state.set_aside == ()
        state, offered = take(state, log, token)
        assert not offered.is_over
        state = settled(sharing.rejected(state, f"{token:032x}", "out of memory", 0.0, 0.0))
    [aside] = state.set_aside
    assert (aside.deliveries, aside.failures, aside.error) == (25, 25, "out of memory")


def test_what_ends_its_workers_is_not_said_to_do_so_where_it_was_rejected() -> None:
    log = log_of(1)
    state, _ = take(sharing.made(Settings(mode="all", max_attempts=25), log), log, 99)
    state = given_up_on(settled(sharing.rejected(state, f"{99:032x}", "bad", 0.0, 0.0)), log)
    [aside] = state.set_aside
    assert (aside.deliveries, aside.failures) == (21, 1)
    assert "delivered 21 times, and 20 times neither acknowledged nor rejected" in aside.error


def test_a_release_is_never_counted_against_a_checkpoint() -> None:
    log = log_of(1)
    state = sharing.made(ALL, log)
    for token in range(3 * sharing.MAX_DELIVERIES):
        state, offered = take(state, log, token)
        assert not offered.is_over
        assert offered.delivery <= 2
        state = settled(sharing.released(state, f"{token:032x}", 0.0))
    assert state.set_aside == ()


def test_what_is_newer_takes_the_place_of_what_was_given_back_where_only_the_newest_counts() -> None:
    log = log_of(2)
    state, _ = take(sharing.made(Settings(mode="latest"), log), log, 1)
    state = settled(sharing.rejected(state, f"{1:032x}", "bad", 0.0, 0.0))
    assert numbers(waiting(state, log)) == [2]
    more = msgspec.structs.replace(log, active=(*log.active, record(3, 3)), commits=3)
    state, offered = take(state, more, 2)
    assert offered.item.number == 3
    assert numbers(waiting(state, more)) == [3]


# ---- those that it does not get -----------------------------------------------------------------------------------


def test_what_is_skipped_is_said_and_not_wanted_and_what_lies_between_still_is() -> None:
    log = log_of(6)
    state = settled(sharing.skipped(sharing.made(ALL, log), [log.active[each] for each in (1, 2, 4)]))
    assert numbers(waiting(state, log)) == [1, 4, 6]
    assert (state.skipped, state.last_skipped and state.last_skipped.number) == (3, 5)
    for token in range(3):
        state, _ = take(state, log, token)
        state = settled(state)
    assert (state.finished, state.through, state.missed) == ((), 6, 0)


def test_the_record_of_what_is_skipped_does_not_grow() -> None:
    state = sharing.made(ALL, log_of(1, commits=10))
    for order in range(12, 3000):
        state = sharing.skipped(state, [record(order, order)])
    assert settled(state).finished == ((12, 2999),)


def test_what_was_deleted_before_the_group_came_to_it_is_counted() -> None:
    log = log_of(5)
    state, _ = take(sharing.made(ALL, log), log, 1)
    log = msgspec.structs.replace(log, active=log.active[3:])
    state, offered = take(state, log, 2)
    assert (offered.item.number, state.missed) == (4, 2)


def test_what_a_worker_has_is_not_skipped() -> None:
    log = log_of(2)
    state, _ = take(sharing.made(ALL, log), log, 1)
    state = sharing.skipped(state, log.active)
    assert (numbers(waiting(state, log)), state.skipped) == ([1], 1)


def test_in_another_log_a_group_begins_again() -> None:
    log = log_of(3)
    state, _ = take(sharing.made(ALL, log), log, 1)
    other = msgspec.structs.replace(log_of(2), origin="log-2")
    assert numbers(waiting(state, other)) == [1, 2]
    assert settled(sharing.moved(state, other)).claims == ()


def test_the_list_of_what_was_set_aside_is_bounded() -> None:
    log = log_of(MAX_SET_ASIDE + 2)
    state = sharing.made(Settings(mode="all", max_attempts=1), log)
    for token in range(MAX_SET_ASIDE + 2):
        state, _ = take(state, log, token)
        rejected = sharing.rejected(state, f"{token:032x}", "x" * 5000, 0.0, 0.0)
        assert rejected is not None
        state = rejected
    state = settled(state)
    assert (len(state.set_aside), state.forgotten) == (MAX_SET_ASIDE, 2)


# ---- on a store ---------------------------------------------------------------------------------------------------


def committed(store: Store, count: int) -> State:
    """A log of so many checkpoints."""
    for number in range(1, count + 1):
        append_state(store, lambda state, number=number: _after(state, record(number, 0)))  # type: ignore[misc]
    return read_tail(store).state


def _after(state: State, *records: CheckpointRecord) -> State:
    state, placed = msgspec.structs.replace(state, origin="log-1").counted(*records)
    return msgspec.structs.replace(state, active=(*state.active, *placed))


def acknowledge_one(group: Group, log: State) -> bool:
    """Claim what is offered and acknowledge it; whether there was anything."""
    token = [""]

    def claim_it(state: GroupState) -> GroupState | None:
        offered = sharing.offer(state, log, (), ())
        if offered is None:
            return None
        made = claim(0)(offered)
        made = msgspec.structs.replace(made, token=offered.item.attempt[-32:])
        token[0] = made.token
        return sharing.claimed(state, log, offered, (), lambda _: made)

    if group.change("claim", claim_it) is None:
        return False
    return group.change("ack", lambda state: sharing.acknowledged(state, token[0])) is not None


class OwnEntryUnreadable:
    """The first claim is written and refused all the same, and what is there then cannot be read ``times`` times."""

    def __init__(self, times: int) -> None:
        self._path = names.link_path("_groups/eval", 2)
        self._left = times
        self._written = False

    def fault(self, call: Call) -> Fault | None:
        if call.path != self._path:
            return None
        if call.operation == "put_if_absent" and not self._written:
            self._written = True
            return Fault.LOST_ANSWER_AS_REFUSAL
        if call.operation == "read" and self._left:
            self._left -= 1
            return Fault.FLIPPED
        return None


def test_a_claim_that_was_written_and_could_not_be_read_back_at_first_is_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distckpt.directory.groups.PAUSES", (0.0,) * 5)
    store = MemoryStore()
    log = committed(store, 2)
    group = Group(FaultyStore(store, OwnEntryUnreadable(4)), "eval", "worker-0")
    group.join(ALL, log)
    assert acknowledge_one(group, log)
    state = read_groups(store)["eval"]
    assert (state.acknowledged, state.claims) == (1, ())


class OnGroups:
    """Every sixth call on a group goes wrong in one of the ways that leave it open what was done, or show what is not."""

    def __init__(self, seed: int) -> None:
        kinds = (
            Fault.NO_ANSWER,
            Fault.LOST_ANSWER,
            Fault.LOST_ANSWER_AS_REFUSAL,
            Fault.REFUSED,
            Fault.LATE,
            Fault.FLIPPED,
        )
        self._faults = RandomFaults(seed, 0.16, kinds)

    def fault(self, call: Call) -> Fault | None:
        return self._faults.fault(call) if call.path.startswith("_groups/") else None


@pytest.mark.parametrize("faulty", [False, True], ids=["a sound store", "a faulty store"])
def test_of_many_workers_each_checkpoint_is_acknowledged_by_one(faulty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.directory.groups.PAUSES", (0.0,) * 9)
    store, counts, unknown = MemoryStore(), [], []
    log = committed(store, 12)

    def work(name: str) -> None:
        group = Group(FaultyStore(store, OnGroups(int(name[-1]))) if faulty else store, "eval", name)
        group.join(ALL, log)
        count, goes_on = 0, True
        while goes_on:
            try:
                goes_on = acknowledge_one(group, log)
                count += goes_on
            except StoreOutcomeUnknownError as error:  # an answer was lost, and others had gone far ahead meanwhile
                unknown.append(error)
        counts.append(count)

    workers = [threading.Thread(target=work, args=(f"worker-{each}",)) for each in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    state = read_groups(store)["eval"]
    assert (state.acknowledged + len(state.claims), len(counts)) == (12, 4)
    assert len(state.claims) <= len(unknown)
    assert sum(counts) <= state.acknowledged <= sum(counts) + len(unknown)
    assert faulty or not unknown
    assert waiting(state, log) == ()


def test_an_entry_in_a_place_that_was_pruned_long_ago_does_not_count() -> None:
    store = MemoryStore()
    log = committed(store, 1)
    late = Group(store, "eval", "late")
    late.join(ALL, log)
    busy = Group(store, "eval", "busy")

    def overtaken(state: GroupState) -> GroupState:
        if state.acknowledged == 0:
            for count in range(1, 100):
                busy.change("ack", lambda now, count=count: msgspec.structs.replace(now, acknowledged=count))  # type: ignore[misc]
        return msgspec.structs.replace(state, skipped=7)

    assert store.objects.keys() >= {names.link_path("_groups/eval", 1)}
    found = late.change("skip", overtaken)
    assert found is not None
    assert (found.acknowledged, found.skipped) == (99, 7)
    assert read_groups(store)["eval"] == found
    assert sum(path.startswith("_groups/") for path in store.objects) <= 90


def test_a_worker_whose_acknowledgement_was_followed_and_pruned_is_not_told_that_it_does_not_count() -> None:
    store = MemoryStore()
    log = committed(store, 1)
    busy = Group(store, "eval", "busy")
    offered = sharing.offer(busy.join(ALL, log), log, (), ())
    assert offered is not None
    busy.change("claim", lambda state: sharing.claimed(state, log, offered, (), claim(1)))
    written: list[str] = []

    class Overtaken:
        """Others go on, a hundred times, after an entry is there and before it is listed whether it counts."""

        def fault(self, call: Call) -> Fault | None:
            if call.operation == "put_if_absent":
                written.append(call.path)
            elif written and call.operation == "list":
                written.clear()
                for count in range(1, 100):
                    busy.change("skip", lambda now, count=count: msgspec.structs.replace(now, skipped=count))  # type: ignore[misc]
            return None

    slow = Group(FaultyStore(store, Overtaken()), "eval", "slow")
    with pytest.raises(StoreOutcomeUnknownError, match="may or may not count"):
        slow.change("ack", lambda state: sharing.acknowledged(state, f"{1:032x}"))
    assert read_groups(store)["eval"].acknowledged == 1


class LateStore(MemoryStore):
    """The answer to one creation at ``path`` is lost; ``meanwhile`` is what happens before that is noticed."""

    path = ""
    meanwhile: Callable[[], object]

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        super().put_if_absent(path, data)
        if path == self.path:
            self.path = ""
            self.meanwhile()
            raise StoreOutcomeUnknownError(path, "no answer")


@pytest.mark.parametrize("followed", [1, 100], ids=["what came next is there", "what came next is gone"])
def test_an_acknowledgement_whose_place_was_filled_again_is_not_told_that_it_does_not_count(followed: int) -> None:
    """It counted, the chain was pruned there, and somebody who had stood still took the free place."""
    store = LateStore()
    log = committed(store, 1)
    busy = Group(store, "eval", "busy")
    offered = sharing.offer(busy.join(ALL, log), log, (), ())
    assert offered is not None
    busy.change("claim", lambda state: sharing.claimed(state, log, offered, (), claim(1)))
    path = names.link_path("_groups/eval", 3)

    def fill_again() -> None:
        for count in range(1, followed + 1):
            busy.change("skip", lambda now, count=count: msgspec.structs.replace(now, skipped=count))  # type: ignore[misc]
        if followed == 1:  # as if the chain were pruned to its newest entry
            store.delete(path)
        store.put_if_absent(path, seal(GroupEntry(1, 3, "skip", 0.0, "late", "f" * 32, "", sharing.made(ALL, log))))

    store.path, store.meanwhile = path, fill_again
    slow = Group(store, "eval", "slow")
    if followed == 1:
        assert slow.change("ack", lambda state: sharing.acknowledged(state, f"{1:032x}")) is not None
    else:
        with pytest.raises(StoreOutcomeUnknownError, match="may or may not count"):
            slow.change("ack", lambda state: sharing.acknowledged(state, f"{1:032x}"))
    assert read_groups(store)["eval"].acknowledged == 1


def test_settings_that_disagree_are_refused_by_name_and_none_takes_what_there_is() -> None:
    store = MemoryStore()
    Group(store, "eval", "a").join(Settings(mode="all", max_attempts=5), State())
    assert Group(store, "eval", "b").join(Settings(), State()).max_attempts == 5
    with pytest.raises(GroupMismatchError, match="max_attempts is 5 and not 3"):
        Group(store, "eval", "c").join(Settings(mode="all", max_attempts=3), State())


@pytest.mark.parametrize("name", ["", "a/b", "..", "_eval", "a b", "x" * 129, "a\n"])
def test_a_group_needs_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a group"):
        Group(MemoryStore(), name, "w")


def test_what_else_lies_among_groups_is_none() -> None:
    store = MemoryStore()
    Group(store, "eval", "a").join(ALL, State())
    store.put_if_absent("_groups/(old)/x.json", b"x")
    store.put_if_absent("_groups/empty/readme.txt", b"x")
    assert group_names(store) == ["empty", "eval"]
    assert list(read_groups(store)) == ["eval"]


def test_skipping_is_said_in_the_groups_own_chain() -> None:
    store = MemoryStore()
    Group(store, "eval", "a").join(ALL, State())  # before there is a log, so that this is another one than it knows
    log = committed(store, 3)
    skip(store, "eval", log.active[:2])
    state = read_groups(store)["eval"]
    assert (numbers(waiting(state, log)), state.skipped) == ([3], 2)
    with pytest.raises(GroupNotFoundError):
        skip(store, "none", log.active[:2])
    assert "_groups/none" not in str(store.objects.keys())


def test_a_group_that_cannot_be_read_says_so() -> None:
    store = MemoryStore()
    Group(store, "eval", "a").join(ALL, State())
    path = names.link_path("_groups/eval", 1)
    store.delete(path)
    store.put_if_absent(path, b"{}")
    with pytest.raises(DamagedError, match="_groups/eval"):
        read_groups(store)


@pytest.mark.parametrize("counted", [True, False])
def test_who_wants_the_newest_never_gets_an_older_one_again_whatever_became_of_it(counted: bool) -> None:
    older, log = log_of(1, counted=counted), log_of(2, counted=counted)
    log = msgspec.structs.replace(log, active=(*older.active, log.active[1]))
    state, _ = take(sharing.made(Settings(mode="latest"), older), older, 1)
    state, offered = take(state, log, 2)
    assert offered.item.number == 2
    state = settled(sharing.acknowledged(state, f"{2:032x}"))
    for after in (sharing.released(state, f"{1:032x}", 1.0), sharing.rejected(state, f"{1:032x}", "why", 1.0, 0.0)):
        assert settled(after).returned == ()
        assert sharing.is_done(settled(after), log)
    dead = {f"{1:032x}"}
    left = sharing.offer(state, log, dead, ())
    assert left is not None
    assert (left.item.number, left.is_over) == (1, True)
    state = settled(sharing.ended(state, log, left, dead, 0.0))
    assert (state.claims, state.set_aside, sharing.is_done(state, log)) == ((), (), True)
