"""``distckpt plot``: what a picture of a run shows, and that it is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.reports import write_report
from distckpt.format.json.log import State
from distckpt.format.json.stats import Durations
from distckpt.storage import open_store
from tests.support.checkpoints import append_state, commit_bare
from tests.support.told import HOUR, tell

BEGAN = 1.8e9


def run(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, ["plot", *map(str, args)])


def shown(directory: Path) -> dict[str, Any]:
    """What programs get."""
    done = run(directory, "--json")
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two runs of an hour, of which the first crashed after its second checkpoint, and the second has less ranks."""
    for number in range(1, 5):
        commit_bare(tmp_path, 100 * number)

    def change(state: State) -> State:
        moments = [(0.3, 8), (0.9, 8), (2.3, 6), (2.9, 6)]
        active = tuple(
            msgspec.structs.replace(record, time=BEGAN + hour * HOUR, world_size=ranks, nbytes=10**9)
            for record, (hour, ranks) in zip(state.active, moments, strict=True)
        )
        first = msgspec.structs.replace(active[0], metrics={"$loss$": 3.0})
        return msgspec.structs.replace(state, active=(first, *active[1:]), run=2)

    append_state(open_store(tmp_path), change, kind="metric")
    costs = {"saves": 2, "stall": Durations(2, 0.1, 0.08), "committed": Durations(2, 8.0, 6.0)}
    tell(tmp_path, 1, began=BEGAN, seconds=HOUR, **costs)
    tell(tmp_path, 2, began=BEGAN + 2 * HOUR, seconds=HOUR, world_size=6, **costs)
    return tmp_path


def test_it_knows_crashes_world_sizes_and_metrics_that_are_not_in_the_log_yet(directory: Path) -> None:
    [attempt] = [one["attempt"] for one in shown(directory)["checkpoints"] if one["number"] == 300]
    write_report(open_store(directory), attempt, {"$loss$": 2.0})
    told = shown(directory)
    assert told["crashes"] == [{"run": 1, "time": BEGAN + HOUR, "after": 200}]
    assert told["resizes"] == [{"number": 300, "from": 8, "to": 6}]
    assert told["metrics"] == {"$loss$": [[100, 3.0], [300, 2.0]]}
    assert [one["state"] for one in told["runs"]] == ["crashed", "open"]
    assert [one["number"] for one in told["checkpoints"]] == [100, 200, 300, 400]


def test_a_picture_has_all_of_it(directory: Path) -> None:
    done = run(directory, "-o", directory / "run.svg")
    assert (done.exit_code, done.stdout) == (0, f"drawn: {directory / 'run.svg'}\n")
    drawn = (directory / "run.svg").read_text()
    for words in ("4 checkpoints", "2 runs, 1 failure", "8 ranks", "crash", "8 to 6 ranks", "stall", "$loss$", "MiB"):
        assert f"{words}" in drawn.replace(r"\$", "$"), words


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_it_is_of_the_kind_that_its_name_says(directory: Path, kind: str) -> None:
    assert run(directory, "-o", directory / f"run.{kind}").exit_code == 0
    assert (directory / f"run.{kind}").read_bytes()[1:4] == kind.upper().encode()


def test_what_there_is_is_drawn_where_nothing_else_is_known(tmp_path: Path) -> None:
    commit_bare(tmp_path, 7)
    assert run(tmp_path, "-o", tmp_path / "run.png").exit_code == 0
    tell(tmp_path, 1, began=-3.0, seconds=1e9)
    assert run(tmp_path, "-o", tmp_path / "again.png").exit_code == 0


def test_wrong_usage_is_said_and_nothing_is_written(directory: Path, tmp_path: Path) -> None:
    assert run(directory).exit_code == 2
    assert "run.gif" in run(directory, "-o", tmp_path / "run.gif").stderr
    assert "No such file" in run(directory, "-o", tmp_path / "nowhere" / "run.png").stderr
    assert not list(tmp_path.glob("run.*"))


def test_without_matplotlib_it_is_said_what_to_install(directory: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from distckpt.cli import main; main(['plot', sys.argv[1], '-o', sys.argv[1] + '/run.png'])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install 'distckpt[demo]'" in done.stderr) == (2, True)
