"""A pin keeps a checkpoint until it is taken away, also from a job that runs, and also if it came at the last moment."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.directory.pins import pin, pin_of, pins, unpin
from distckpt.errors import CheckpointNotFoundError
from distckpt.format import names
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore, MemoryStore
from tests.support.checkpoints import append_state, commit, new_attempt, put_manifest
from tests.support.small_runs import Trainer, assert_loads, numbers, on_disk, records, run, settled


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def committed(store: MemoryStore, number: int = 1) -> CheckpointRecord:
    record = put_manifest(store, number, new_attempt())
    commit(store, record)
    return record


def retire(store: MemoryStore) -> None:
    append_state(store, lambda state: State(retiring=state.active), "retire")


def test_a_pin_holds_for_a_running_job_until_it_is_taken_away(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(1)
        assert call("pin", tmp_path / "ckpt-1", "--note", "the best one").exit_code == 0
        for number in (2, 3):
            trainer.saved(number)
        assert numbers(tmp_path) == [1, 3]
        assert call("unpin", tmp_path / "ckpt-1").exit_code == 0
        trainer.saved(4)
    assert on_disk(tmp_path) == [4]


def test_a_pinned_checkpoint_whose_number_is_saved_again_is_kept_too(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        [first] = records(tmp_path)
        call("pin", tmp_path)
        trainer.saved(1)
    settled(tmp_path)
    state = read_tail(LocalStore(tmp_path)).state
    assert state.preserved == (first,)
    assert state.retiring == ()
    assert first.attempt not in {record.attempt for record in state.active}
    assert len(list(tmp_path.glob("ckpt-1/*/manifest.json"))) == 2


def test_what_retired_before_the_pin_was_seen_comes_back_with_the_next_manager(tmp_path: Path) -> None:
    """The leases had been read, then came the pin, and then the entry."""
    run(tmp_path, 1, 2)
    store = LocalStore(tmp_path)
    first, second = records(tmp_path)
    pin(store, first.attempt, "somebody", "", 1.0)
    append_state(store, lambda state: msgspec.structs.replace(state, active=(second,), retiring=(first,)), "retire")
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(3)
        settled(tmp_path)
    state = read_tail(store).state
    assert (state.preserved, state.retiring) == ((first,), ())
    assert_loads(tmp_path / "ckpt-1", 1)


def test_a_pin_that_comes_too_late_says_so_and_leaves_nothing() -> None:
    store = MemoryStore()
    record = committed(store)
    retire(store)
    with pytest.raises(CheckpointNotFoundError, match="too late"):
        pin(store, record.attempt, "somebody", "", 1.0)
    assert list(store.list(names.LEASES)) == []


def test_a_pin_holds_only_when_its_maker_has_looked() -> None:
    class Watched(MemoryStore):
        """Retires the checkpoint between the writing of the pin and the look into the log."""

        def replace(self, path: str, data: bytes) -> None:
            super().replace(path, data)
            if path.startswith(names.LEASES):
                retire(self)
                assert Leases(self).read().attempts == {record.attempt}
                assert Leases(self).read().pinned == frozenset()

    store = Watched()
    record = committed(store)
    with pytest.raises(CheckpointNotFoundError):
        pin(store, record.attempt, "somebody", "", 1.0)


def test_a_pin_is_made_once_and_the_first_one_says_who() -> None:
    store = MemoryStore()
    record = committed(store)
    first = pin(store, record.attempt, "alice", "the best one", 7.0)
    assert pin(store, record.attempt, "bob", "mine", 8.0) == first
    assert pins(store) == {record.attempt: first}
    found = Leases(store).read()
    assert (found.attempts, found.pinned) == ({record.attempt}, {record.attempt})
    assert unpin(store, record.attempt)
    assert not unpin(store, record.attempt)
    assert Leases(store).read().attempts == frozenset()


def test_what_a_killed_command_left_is_made_to_hold_by_the_next() -> None:
    store = MemoryStore()
    record = committed(store)
    store.replace(names.pin_path(record.attempt), seal(Lease(2, record.attempt, "alice", None, since=1.0)))
    assert pin(store, record.attempt, "bob", "", 2.0).holds
    lease = pin_of(store, record.attempt)
    assert lease is not None
    assert (lease.holder, lease.holds) == ("bob", True)


def test_a_damaged_pin_is_a_pin_of_nobody_known() -> None:
    store = MemoryStore()
    record = committed(store)
    store.replace(names.pin_path(record.attempt), b"damaged")
    assert pins(store)[record.attempt].holder == ""
    assert unpin(store, record.attempt)


def test_a_lease_with_an_end_says_nothing_of_a_pin() -> None:
    with pytest.raises(ValueError, match="only a pin"):
        seal(Lease(2, new_attempt(), "somebody", 1.0, note="why"))
    assert b"note" not in seal(Lease(2, new_attempt(), "somebody", 1.0))


def test_ls_and_show_say_who_pinned_what(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    made = json.loads(call("pin", tmp_path / "ckpt-1", "--note", "the best one", "--json").stdout)
    assert made["pin"]["note"] == "the best one"
    first, second = json.loads(call("ls", tmp_path, "--json").stdout)["checkpoints"]
    assert (first["state"], first["pin"]) == (["active", "pinned"], made["pin"])
    assert (second["state"], second["pin"]) == (["newest"], None)
    assert json.loads(call("show", tmp_path / "ckpt-1", "--json").stdout)["pin"] == made["pin"]
    assert "the best one" in call("show", tmp_path / "ckpt-1").stdout
    assert "active, pinned" in call("ls", tmp_path).stdout


def test_unpin_takes_a_pin_out_of_the_log_too_where_no_job_runs(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        trainer.pin(1)
    result = call("unpin", tmp_path / "ckpt-1")
    assert (result.exit_code, records(tmp_path)[0].pinned) == (2, True)
    assert "--force" in result.stderr
    assert call("unpin", tmp_path / "ckpt-1", "--force").exit_code == 0
    assert not records(tmp_path)[0].pinned
    assert "was not pinned" in call("unpin", tmp_path / "ckpt-1").stdout


def test_only_what_is_committed_can_be_pinned(tmp_path: Path) -> None:
    run(tmp_path, 1)
    for path in (tmp_path / "ckpt-2", tmp_path / "elsewhere" / "ckpt-1", tmp_path / "nowhere"):
        result = call("pin", path)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
    assert not (tmp_path / names.LEASES).exists()
