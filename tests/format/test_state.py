"""Questions to a checkpoint state: which checkpoints it has, and which of them is the newest."""

from __future__ import annotations

from distckpt.cli.listing import in_order
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.state_file import from_log_state


def record(number: int, epoch: int = 1, *, time: float = 0.0, manifest_size: int = 1) -> CheckpointRecord:
    return CheckpointRecord(
        name="ckpt",
        number=number,
        attempt=f"e{epoch}-{number:032x}",
        manifest_size=manifest_size,
        manifest_crc32c=0,
        time=time,
        world_size=1,
        nbytes=1,
    )


def test_the_last_one_committed_is_the_newest_and_the_others_follow_by_age() -> None:
    """Ranks may begin the later of two saves first, so the one that was committed last need not be the youngest."""
    state = State(active=(record(3), record(5), record(4)), preserved=(record(1), record(2, epoch=2)))
    assert [one.number for one in state.newest_first()] == [4, 2, 5, 3, 1]
    assert state.newest() == record(4)


def test_no_clock_says_which_is_the_newest() -> None:
    state = State(preserved=(record(2, time=10.0), record(1, time=900.0)))
    assert state.newest() == record(2, time=10.0)
    assert from_log_state(state).model_checkpoint_path == "ckpt-2"
    assert [(one.record.number, one.marks[0]) for one in in_order(state)] == [(1, "preserved"), (2, "newest")]


def test_a_checkpoint_that_is_both_active_and_preserved_is_one_checkpoint() -> None:
    state = State(active=(record(1), record(2)), preserved=(record(1),))
    assert list(state.alive().values()) == [record(1), record(2)]
    assert state.newest_first() == (record(2), record(1))


def test_what_is_being_deleted_was_committed_but_may_not_be_opened() -> None:
    gone, failed = record(1), record(2, manifest_size=0)
    state = State(active=(record(3),), retiring=(gone, failed))
    assert state.find(gone.attempt) == gone
    assert state.find(failed.attempt) is None
    assert set(state.alive()) == {record(3).attempt}
    assert state.known() == {gone.attempt, failed.attempt, record(3).attempt}


def test_an_empty_state_has_nothing() -> None:
    assert (State().newest(), State().newest_first(), State().find("e1-0")) == (None, (), None)
