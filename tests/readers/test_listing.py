"""``distckpt ls``: what it says beside the checkpoints, what all of them take, and what is left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.lease import hold
from distckpt.directory.log import read_tail
from distckpt.format import names
from distckpt.format.json.log import State
from distckpt.storage import open_store
from tests.support.checkpoints import append_state, new_attempt, write_checkpoint
from tests.support.exports import describe_export


def run(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, args)))


def listed(directory: Path, *args: str) -> dict[str, Any]:
    """What programs get."""
    told: dict[str, Any] = json.loads(run("ls", directory, "--json", *args).stdout)
    return told


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A retiring, a preserved and two active checkpoints."""
    for number in range(1, 5):
        write_checkpoint(tmp_path, number, {"step": number})

    def change(state: State) -> State:
        retiring, preserved, *active = state.active
        return msgspec.structs.replace(state, active=tuple(active), preserved=(preserved,), retiring=(retiring,))

    append_state(open_store(tmp_path), change, kind="retire")
    return tmp_path


def test_it_sums_up_what_may_be_opened_and_what_is_going(directory: Path) -> None:
    sizes = [one["nbytes"] for one in listed(directory)["checkpoints"]]
    totals = listed(directory)["totals"]
    assert totals == {
        "checkpoints": 3,
        "nbytes": sum(sizes[1:]),
        "retiring": 1,
        "retiring_nbytes": sizes[0],
        "exported": 0,
    }
    assert run("ls", directory).stdout.splitlines()[-1].startswith("3 checkpoints of ")
    assert ", 1 retiring of " in run("ls", directory).stdout


def test_it_shows_who_reads_a_checkpoint_for_as_long_as_somebody_does(directory: Path) -> None:
    store = open_store(directory)
    attempt = read_tail(store).state.active[0].attempt
    with hold(store, attempt, "an evaluation"):
        [one] = [one for one in listed(directory)["checkpoints"] if one["checkpoint"] == "ckpt-3"]
        assert (one["state"], one["readers"]) == (["active", "leased"], ["an evaluation"])
        assert "active, leased" in run("ls", directory).stdout
    assert "leased" not in run("ls", directory).stdout


def test_it_shows_exports_and_says_which_cannot_be_read(directory: Path) -> None:
    store = open_store(directory)
    state = read_tail(store).state
    assert "export" not in run("ls", directory).stdout
    for record in state.active:
        describe_export(store, record)
    record = state.active[0]
    (directory / names.attempt_folder(record.name, record.number, record.attempt) / names.EXPORT).write_text("{}")
    assert [one["exported"] for one in listed(directory)["checkpoints"]] == [0, 0, None, 1]
    lines = [line.split() for line in run("ls", directory).stdout.splitlines()]
    assert [line[6:8] for line in lines if line[:1] in (["ckpt-3"], ["ckpt-4"])] == [["damaged", "1"], ["1", "B"]]
    assert lines[-1][-4:] == ["exports", "of", "1", "B"]


def test_the_newest_log_entry_is_named_if_it_cannot_be_read_and_is_the_exit_status(directory: Path) -> None:
    entry = directory / names.entry_path(read_tail(open_store(directory)).seq)
    entry.write_bytes(b"{}")
    result = run("ls", directory)
    assert result.exit_code == 1
    assert f"not listed: {entry}: " in result.stdout
    assert "ckpt-4" in result.stdout
    as_json = run("ls", directory, "--json")
    assert as_json.exit_code == 1
    [told] = json.loads(as_json.stdout)["unreadable"]
    assert told.startswith(f"{entry}: ")


@pytest.mark.parametrize("command", ["ls", "ls --all", "show", "diff", "verify"])
def test_a_log_entry_that_cannot_be_read_is_warned_of_once(
    directory: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    entry = names.entry_path(read_tail(open_store(directory)).seq)
    (directory / entry).write_bytes(b"{}")
    for _ in range(2):  # two commands: each tells its user
        caplog.clear()
        run(*command.split(), *[directory] * (2 if command == "diff" else 1))
        assert [entry in record.getMessage() for record in caplog.records] == [True]


def test_leftovers_are_listed_if_asked_for_and_nothing_is_deleted(directory: Path) -> None:
    left = f"ckpt-9/{new_attempt(0)}"
    (directory / left).mkdir(parents=True)
    (directory / left / "00000-0.arrow").write_bytes(b"x" * 2048)
    assert "leftovers" not in listed(directory)
    with hold(open_store(directory), read_tail(open_store(directory)).state.active[0].attempt, "a reader"):
        found = {one["path"]: (one["kind"], one["nbytes"]) for one in listed(directory, "--all")["leftovers"]}
    assert found.pop(left) == ("unfinished save", 2048)
    assert [kind for kind, _ in found.values()] == ["retired checkpoint"]
    assert "2 leftovers of " in run("ls", directory, "--all").stdout
    assert (directory / left / "00000-0.arrow").exists()
