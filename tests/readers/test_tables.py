"""Tables of the command line: what they show where there is little room, and where there is no end to it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import distckpt
from distckpt.cli import main
from distckpt.cli.tables import Table, Twig, folded
from distckpt.format.json.log import State
from distckpt.storage import open_store
from tests.support.checkpoints import append_state, commit_bare, new_attempt, write_checkpoint

LONG = "encoder.layers.23.self_attention.query_key_value.weight"


def lines(*args: str | Path, columns: int | None = None) -> list[str]:
    env = {"COLUMNS": None if columns is None else str(columns)}
    done = CliRunner(env=env).invoke(main, list(map(str, args)))
    assert done.exit_code == 0, done.output
    return [line.rstrip() for line in done.stdout.splitlines()]


def drawn(table: Table, width: int) -> list[str]:
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().splitlines()]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With a checkpoint that has metrics, a long number, and a size of a petabyte."""
    commit_bare(tmp_path, 123_456_789)
    metrics = {"loss": 1 / 3, "a_rather_long_name_of_a_metric": 2 / 3}

    def change(state: State) -> State:
        return State(active=(msgspec.structs.replace(state.active[0], metrics=metrics, nbytes=10**15),))

    append_state(open_store(tmp_path), change, kind="metric")
    write_checkpoint(tmp_path, 5, {"model": {LONG: torch.ones(40, 30)}, "step": 5})
    return tmp_path


@pytest.mark.parametrize("columns", [20, 45, 60, 80])
def test_where_there_is_little_room_names_stay_and_it_is_said_what_is_left_out(directory: Path, columns: int) -> None:
    shown = lines("ls", directory, columns=columns)
    assert max(map(len, shown)) <= columns
    assert [line.split()[0] for line in shown if "ckpt-" in line] == ["ckpt-123456789", "ckpt-5"]
    told = " ".join(shown).partition("too narrow for: ")[2]
    assert "attempt" in told
    assert ("state" in told) == (columns == 20)


@pytest.mark.parametrize("command", ["ls", "show"])
def test_in_a_pipe_nothing_is_folded_cut_or_left_out(directory: Path, command: str) -> None:
    whole = lines(command, directory)
    assert whole == lines(command, directory, columns=5000)
    assert not any("too narrow" in line for line in whole)
    if command == "show":
        assert any(LONG in line and "float32" in line for line in whole)


@pytest.mark.parametrize("columns", [30, 45, 80])
def test_show_is_one_tree_at_any_width(directory: Path, columns: int) -> None:
    shown = lines("show", directory, columns=columns)
    tree = shown[shown.index(next(line for line in shown if line.startswith("key"))) + 2 :]
    tree = tree[: next(at for at, line in enumerate(tree) if line.startswith("step"))]
    assert tree[0].startswith("model")
    assert tree[1].startswith("└─ ")
    assert all(line.startswith("   ") for line in tree[2:])
    assert "".join(line.removeprefix("└─ ").strip().split(" ")[0] for line in tree[1:]) == LONG
    assert max(map(len, tree)) <= columns


def test_groups_and_gc_keep_the_names_too(directory: Path) -> None:
    checkpoints = distckpt.watch(directory, group="evaluation", worker="alice", timeout=0)
    next(checkpoints)
    left = f"ckpt-9/{new_attempt(0)}"
    (directory / left).mkdir(parents=True)
    (directory / left / "00000-0.arrow").write_bytes(b"x")
    groups = lines("groups", directory, columns=45)
    gone = lines("gc", directory, "--dry-run", columns=45)
    checkpoints.close()
    assert max(map(len, [*groups, *gone])) <= 45
    starts = [line.split()[0] for line in groups if line]
    assert starts[2] == "evaluation"
    assert starts.count("ckpt-5") == 1
    assert any(line.startswith(left) for line in gone)
    assert sum(line.startswith("too narrow for: ") for line in [*groups, *gone]) >= 2


def test_columns_go_in_the_order_that_was_said_and_only_as_many_as_must() -> None:
    table = Table(["name", "much", "little"], right=["much"], least=["much"])
    table.add_row("a-rather-long-name", "12345", "xyz")
    assert drawn(table, 40)[2] == "a-rather-long-name  12345  xyz"
    assert drawn(table, 33)[2] == "a-rather-long-name  12345  xyz"
    assert drawn(table, 32)[2:] == ["a-rather-long-name  xyz", "too narrow for: much"]
    assert drawn(table, 25)[2:] == ["a-rather-long-name", "too narrow for: much,", "little"]
    assert "".join(drawn(table, 10)[2:4]) == "a-rather-long-name"


def test_what_may_fold_folds_before_a_column_goes() -> None:
    table = Table(["name", "why"], folds=["why"])
    table.add_row("one", "a sentence of several words that is long")
    shown = drawn(table, 30)
    assert shown[0].split() == ["name", "why"]
    assert (
        " ".join(line.removeprefix("one").strip() for line in shown[2:]) == "a sentence of several words that is long"
    )


def test_a_name_is_cut_after_a_separator_and_is_whole_again_when_put_together() -> None:
    assert folded(LONG, 24) == ["encoder.layers.23.self_", "attention.query_key_", "value.weight"]
    assert "".join(folded("x" * 100, 7)) == "x" * 100
    table = Table(["key"])
    table.add_row(Twig("├─ ", "│  ", "one.two"))
    assert drawn(table, 9)[2:] == ["├─ one.", "│  two"]
