"""A tag is a name for a checkpoint, which keeps it as a pin does, and which no other checkpoint can take."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main
from distckpt.directory.collect import Survey
from distckpt.directory.garbage import GARBAGE_SECONDS
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.directory.tags import tag, tag_of, tagged, tags, untag
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import FORMAT, Lease
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.sealed import seal
from distckpt.storage import MemoryStore, open_store
from tests.support.checkpoints import append_state, commit, commit_bare, new_attempt, put_manifest, write_checkpoint
from tests.support.small_runs import Trainer, numbers


def call(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, [str(argument) for argument in arguments])


def committed(store: MemoryStore, number: int = 1) -> CheckpointRecord:
    record = put_manifest(store, number, new_attempt())
    commit(store, record)
    return record


def test_a_tag_holds_for_a_running_job_until_it_is_taken_away(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(1)
        assert call("tag", tmp_path / "ckpt-1", "best").exit_code == 0
        for number in (2, 3):
            trainer.saved(number)
        assert numbers(tmp_path) == [1, 3]
        assert call("untag", tmp_path / "best").exit_code == 0
        trainer.saved(4)
    assert numbers(tmp_path) == [4]


def test_it_is_said_instead_of_the_number_by_every_command_and_reader(tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path, number, {"step": number})
    assert call("tag", tmp_path / "ckpt-1", "best", "--note", "lowest loss").exit_code == 0
    best = tmp_path / "best"
    assert distckpt.load(best) == {"step": 1}
    with distckpt.open(best, lease=True) as reader:
        assert reader.path == str(tmp_path / "ckpt-1")
    assert distckpt.checkpoint_exists(best)
    assert json.loads(call("show", best, "--json").stdout)["tags"] == ["best"]
    assert "tagged best" in call("show", tmp_path / "ckpt-1").stdout
    assert call("verify", best).stdout.startswith("ckpt-1  good")
    assert json.loads(call("diff", best, tmp_path, "--json").stdout)["differing"] == ["step"]
    assert call("cp", best, tmp_path.parent / f"{tmp_path.name}-copy").exit_code == 0
    listed = json.loads(call("ls", tmp_path, "--json").stdout)["checkpoints"]
    assert [one["tags"] for one in listed] == [["best"], []]
    assert call("ls", tmp_path).stdout.splitlines()[0].split()[:3] == ["checkpoint", "tags", "state"]
    assert call("pin", best).exit_code == 0
    assert json.loads(call("show", best, "--json").stdout)["pin"] is not None


def test_it_can_be_moved_to_another_checkpoint_only_once_it_was_taken_away(tmp_path: Path) -> None:
    for number in (1, 2):
        commit_bare(tmp_path, number)
    for _ in range(2):
        assert call("tag", tmp_path / "ckpt-1", "best").exit_code == 0
    refused = call("tag", tmp_path, "best")
    assert (refused.exit_code, f"distckpt untag {tmp_path}/best" in refused.stderr) == (2, True)
    for done in ("is no tag any more", "was no tag"):
        assert done in call("untag", tmp_path / "best").stdout
    assert call("tag", tmp_path, "best").exit_code == 0
    assert "ckpt-2" in call("tag", tmp_path / "best", "last").stdout
    assert call("untag", tmp_path / "nowhere" / "best").exit_code == 2


def test_one_that_is_no_path_there_and_one_that_was_mistyped_are_told(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    call("tag", tmp_path, "best")
    assert f"it is a tag, of {tmp_path}/ckpt-1" in call("ls", tmp_path / "best").stderr
    assert f"Was {tmp_path}/best meant?" in call("show", tmp_path / "bset").stderr


def test_what_has_a_tag_is_not_removed(tmp_path: Path) -> None:
    for number in (1, 2):
        commit_bare(tmp_path, number)
    call("tag", tmp_path / "ckpt-1", "best")
    removed = call("rm", tmp_path / "ckpt-1", "--force", "-y")
    assert (removed.exit_code, "has the tag best" in removed.stderr) == (2, True)
    call("untag", tmp_path / "best")
    assert call("rm", tmp_path / "ckpt-1", "--force", "-y").exit_code == 0


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "ckpt-42", "checkpoint", "x" * 65, "_log", "a b", f"e1-{'a' * 32}", "\x1b[31m"]
)
def test_what_could_be_taken_for_something_else_is_no_tag(name: str) -> None:
    store = MemoryStore()
    with pytest.raises(ValueError, match="cannot be a tag"):
        tag(store, name, committed(store).attempt, "me", "", 1.0)
    assert not untag(store, name)
    assert not list(store.list(names.LEASES))


def test_one_that_came_too_late_is_no_tag_and_leaves_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    record = committed(store)
    append_state(store, lambda state: State(retiring=state.active), "retire")
    with pytest.raises(CheckpointNotFoundError, match="too late"):
        tag(store, "best", record.attempt, "me", "", 1.0)
    assert tags(store) == {}


class _NoSecond(MemoryStore):
    """A store that fails where a tag is made to hold."""

    def replace(self, path: str, data: bytes) -> None:
        raise StorageError(path, "not now")


def test_one_that_cannot_be_made_to_hold_is_none(tmp_path: Path) -> None:
    store = _NoSecond()
    record = committed(store)
    with pytest.raises(StorageError):
        tag(store, "best", record.attempt, "me", "", 1.0)
    assert tag_of(store, "best") is None


def test_one_whose_maker_was_killed_is_finished_by_whoever_gives_the_same_name_again() -> None:
    store = MemoryStore()
    record = committed(store)
    begun = Lease(FORMAT, record.attempt, "somebody", None, since=1.0)
    store.put_if_absent(names.tag_path("best"), seal(begun))
    assert tag(store, "best", record.attempt, "me", "", 2.0) == msgspec.structs.replace(begun, holds=True)
    assert Leases(store).read().pinned == {record.attempt}


def test_one_of_what_is_gone_says_so_and_is_collected() -> None:
    store = MemoryStore()
    record = committed(store)
    tag(store, "best", record.attempt, "me", "", 1.0)
    assert tagged(store, "best") == read_tail(store).state.active[0]
    append_state(store, lambda state: msgspec.structs.replace(state, active=()), "forget")
    with pytest.raises(CheckpointNotFoundError, match="not there any more"):
        tagged(store, "best")
    now = 0.0
    survey = Survey(store, GARBAGE_SECONDS, lambda: now)
    survey.look()
    now = 2 * GARBAGE_SECONDS
    assert [one.left.path for one in survey.look().found if "tag" in one.kind] == [names.tag_path("best")]


def test_one_that_cannot_be_read_names_nothing(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    call("tag", tmp_path, "best")
    (tmp_path / names.tag_path("best")).write_text("{}")
    shown = call("show", tmp_path / "best")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert call("ls", tmp_path).exit_code == 0
    assert tagged(open_store(tmp_path), "other") is None
