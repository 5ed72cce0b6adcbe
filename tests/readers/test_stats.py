"""``distckpt stats``: what people and programs see of what runs have told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.format import names
from distckpt.format.json.stats import Durations, SaveTook
from tests.support.small_runs import run
from tests.support.told import HOUR, tell


def stats(*args: str | Path, columns: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": columns}).invoke(main, ["stats", *map(str, args)])


def job(directory: Path, runs: int) -> None:
    """A job of so many runs of 19 hours, of which all but the last crashed; begun by a run that left no word."""
    run(directory, 1)
    for path in (directory / names.STATS).iterdir():
        path.unlink()
    for number in range(1, runs + 1):
        tell(
            directory,
            number,
            seconds=19 * HOUR,
            saves=114,
            starting_seconds=60.0,
            saving_seconds=120.0,
            unsaved_seconds=300.0,
            bytes_committed=10**14,
            bytes_written=10**13,
            first_stall=Durations(1, 6.0, 6.0),
            stall=Durations(113, 113.0, 2.5),
            written=Durations(114, 114 * 20.0, 35.0),
            committed=Durations(114, 114 * 25.0, 60.0),
            between=Durations(113, 113 * 600.0, 700.0),
            restored=Durations(1, 90.0, 90.0),
        )


def test_it_shows_where_the_time_went_and_how_often_to_save(tmp_path: Path) -> None:
    job(tmp_path, 5)
    shown = stats(tmp_path)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "goodput 95.24 % of 4 d, from the first start to the last sign of life"
    assert sum("crashed" in line for line in lines) == 4
    assert sum(line.split()[4:5] == ["h"] and "open" in line for line in lines) == 1
    assert any(line.split() == ["training", "lost", "to", "failures", "20", "min", "0.34", "%"] for line in lines)
    assert any(line.split() == ["down", "after", "failures", "4.0", "h", "4.04", "%"] for line in lines)
    assert "570 saves begun, 570 committed, 0 failed; 455 TiB in checkpoints" in shown.stdout
    assert "4 failures in 4 d of running: one every 10 h to 3 d, with 90% confidence" in shown.stdout
    assert "a save costs 1.0 s of training: save every 6.9 min, within 4.5 min to 12 min (Daly 2006)" in shown.stdout
    assert "so far it was saved every 10 min" in shown.stdout


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (1, ("no failures seen in 19 h of running", "there is no reason to save more often than every 3.6 min")),
        (
            3,
            (
                "2 failures in 2 d",
                "save every 4.2 min to 18 min (Daly 2006); the failures are too few to say it better",
            ),
        ),
    ],
)
def test_with_few_failures_it_says_no_more_than_it_knows(tmp_path: Path, runs: int, said: tuple[str, ...]) -> None:
    job(tmp_path, runs)
    shown = stats(tmp_path).stdout
    for words in said:
        assert words in shown
    interval = json.loads(stats(tmp_path, "--json").stdout)["interval"]
    assert interval["seconds"] is None
    assert (interval["bounds"][1] is None) == (runs == 1)


@pytest.mark.parametrize(("columns", "width"), [(None, 100), ("70", 70)])
def test_its_tables_fit_and_nothing_folds_when_piped(tmp_path: Path, columns: str | None, width: int) -> None:
    job(tmp_path, 20)
    lines = stats(tmp_path, columns=columns).stdout.splitlines()
    tables = [line for line in lines if "  " in line]
    assert max(map(len, tables)) <= width
    assert sum("crashed" in line for line in lines) == 11
    assert "and 8 earlier runs; --json shows them all" in lines
    assert any(line.startswith("19 failures in") and line.endswith("confidence") for line in lines)


def late(*ranks: int | None) -> tuple[SaveTook, ...]:
    """A save for each of them, by which it was waited for: longer by the higher ones."""
    return tuple(SaveTook(at, 60.0 * at, 1.0, 9.0, rank, float(rank or 0)) for at, rank in enumerate(ranks))


def test_it_says_which_ranks_the_others_wait_for(tmp_path: Path) -> None:
    run(tmp_path, 1)
    for path in (tmp_path / names.STATS).iterdir():
        path.unlink()
    tell(tmp_path, 1, recent=late(7, 7, 7))
    tell(tmp_path, 2, recent=late(3, None, 1, 3, 3, 2))
    tell(tmp_path, 3)
    lines = [line.split() for line in stats(tmp_path).stdout.splitlines()]
    at = next(at for at, line in enumerate(lines) if line[:5] == ["landed", "last", "in", "run", "2"])
    assert [line[:5] for line in lines[at + 2 : at + 5]] == [
        ["rank", "3", "3", "of", "5"],
        ["rank", "2", "1", "of", "5"],
        ["rank", "1", "1", "of", "5"],
    ]
    told = json.loads(stats(tmp_path, "--json").stdout)
    assert told["runs"][1]["recent"][0] == {
        "number": 0, "at": 0.0, "stall": 1.0, "committed": 9.0, "last": 3, "lag": 3.0,
    }  # fmt: skip


def test_programs_get_all_of_it(tmp_path: Path) -> None:
    job(tmp_path, 2)
    (tmp_path / names.STATS / f"{7:018d}-{7:032x}.json").write_text("{}")
    told = json.loads(stats(tmp_path, "--json").stdout)
    assert told["directory"] == str(tmp_path)
    assert told["goodput"] == told["seconds"]["productive"] / told["seconds"]["wall"]
    assert told["failures"]["count"] == 1
    assert told["failures"]["mean_time_between"] == 38 * HOUR
    assert [(one["run"], one["state"], one["lost_to_failures"]) for one in told["runs"]] == [
        (1, "crashed", 300.0),
        (2, "open", 0.0),
    ]
    assert told["runs"][0]["stall"] == {"times": 113, "total": 113.0, "longest": 2.5, "mean": 1.0}
    assert (told["silent_runs"], len(told["passed_over"])) == (0, 1)
    assert "passed over: " in stats(tmp_path).stdout


def test_a_directory_of_which_nothing_was_told_is_said_in_one_sentence(tmp_path: Path) -> None:
    for place, why in ((tmp_path, "the folder is empty"), (tmp_path / "nowhere", "there is nothing in ")):
        result = stats(place)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"Error: {place}: no run has told here what it has measured; {why}")
    (tmp_path / names.STATS).mkdir()
    (tmp_path / names.STATS / f"{7:018d}-{7:032x}.json").write_text("{}")
    assert "but for what cannot be read: " in stats(tmp_path).stderr
