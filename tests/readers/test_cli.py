from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.cli.text import number_ranges
from distckpt.directory.log import read_tail
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import open_store
from distckpt.terminal.sizes import human_bytes
from tests.support.checkpoints import (
    PerRankValues,
    append_state,
    commit_bare,
    new_attempt,
    put_manifest,
    write_checkpoint,
)
from tests.support.damage import flip


def run(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, args)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run of two ranks with one preserved, one retiring and three active checkpoints."""
    for number in range(1, 6):
        commit_bare(tmp_path, number) if number < 5 else write_checkpoint(tmp_path, number, a_tree(), ranks=2)

    def change(state: State) -> State:
        retiring, preserved, *active = state.active
        pinned = msgspec.structs.replace(active[0], pinned=True, metrics={"loss": 0.123456, "top1": 71.0})
        return State(active=(pinned, *active[1:]), preserved=(preserved,), retiring=(retiring,))

    append_state(open_store(tmp_path), change, kind="retire")
    return tmp_path


def a_tree() -> dict[str, Any]:
    return {
        "model": {"layers.0.weight": torch.ones(40, 30), "layers.0.bias": torch.zeros(40, dtype=torch.bfloat16)},
        "optimizer": {"state": {"layers.0.weight": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "loader": PerRankValues([{"cursor": 7}, {"cursor": 9}]),
        "step": 5,
    }


def newest(directory: Path) -> CheckpointRecord:
    return read_tail(open_store(directory)).state.active[-1]


def a_shard(directory: Path) -> Path:
    return next((directory / "ckpt-5").glob("*/00000-0.arrow"))


def assert_one_sentence(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words)
    assert "Traceback" not in result.stderr


# ---- ls -----------------------------------------------------------------------------------------------------------


def test_ls_shows_every_checkpoint_and_how_it_stands(directory: Path) -> None:
    result = run("ls", directory)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if "ckpt-" in line]
    assert [line[:2] for line in lines] == [
        ["ckpt-1", "retiring"],
        ["ckpt-2", "preserved"],
        ["ckpt-3", "active,"],
        ["ckpt-4", "active"],
        ["ckpt-5", "newest"],
    ]
    assert "active, pinned" in result.stdout
    assert "loss=0.12346" in result.stdout
    assert "top1=71" in result.stdout
    record = newest(directory)
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
    short = record.attempt.partition("-")[2][:8]
    assert lines[-1] == ["ckpt-5", "newest", *saved.split(), *human_bytes(record.nbytes).split(), "2", f"e1-{short}"]
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_ls_as_json(directory: Path) -> None:
    listed = json.loads(run("ls", directory, "--json").stdout)
    assert listed["directory"] == str(directory)
    assert [(one["checkpoint"], one["state"]) for one in listed["checkpoints"]] == [
        ("ckpt-1", ["retiring"]),
        ("ckpt-2", ["preserved"]),
        ("ckpt-3", ["active", "pinned"]),
        ("ckpt-4", ["active"]),
        ("ckpt-5", ["newest"]),
    ]
    assert listed["checkpoints"][2]["metrics"] == {"loss": 0.123456, "top1": 71.0}
    record = msgspec.to_builtins(newest(directory))
    assert {key: listed["checkpoints"][-1][key] for key in record} == record


def test_ls_fits_into_a_hundred_columns_whatever_it_shows(tmp_path: Path) -> None:
    commit_bare(tmp_path, 123_456_789)
    metrics = {f"metric_{number}": 1 / 3 for number in range(5)}

    def change(state: State) -> State:
        return State(
            active=(msgspec.structs.replace(state.active[0], metrics=metrics, nbytes=10**15, world_size=4096),)
        )

    append_state(open_store(tmp_path), change, kind="metric")
    shown = run("ls", tmp_path).stdout
    assert max(map(len, shown.splitlines())) <= 100
    assert all(f"{name}=0.33333" in shown for name in metrics)


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_nothing_there_is_one_sentence_and_status_2(tmp_path: Path, command: str) -> None:
    assert_one_sentence(run(command, tmp_path), 2, str(tmp_path))
    assert_one_sentence(run(command, tmp_path / "nowhere"), 2, "nowhere")
    put_manifest(open_store(tmp_path), 1, new_attempt())
    append_state(open_store(tmp_path), lambda state: state, kind="claim")
    assert_one_sentence(run(command, tmp_path), 2, "no checkpoint has been committed here")


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_wrong_paths_and_usage_are_status_2(command: str) -> None:
    assert_one_sentence(run(command, "nosuch://bucket/run"), 2, "nosuch://")
    assert_one_sentence(run(command, ""), 2)
    assert_one_sentence(run(command, "/tmp", "-o", "token=anon"), 2, "token")
    assert run(command).exit_code == 2
    assert run(command, "/tmp", "-o", "token").exit_code == 2
    assert run(command, "/tmp", "--nosuch").exit_code == 2


def test_a_log_of_which_nothing_can_be_read_is_damage(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    flip(tmp_path / names.entry_path(1), 20)
    for command in ("ls", "show", "verify"):
        assert_one_sentence(run(command, tmp_path), 1, names.entry_path(1))


# ---- show ---------------------------------------------------------------------------------------------------------


def test_show_draws_the_tree(directory: Path) -> None:
    shown = run("show", directory / "ckpt-5")
    assert shown.exit_code == 0
    cells = [line.strip(" │├└─").split() for line in shown.stdout.splitlines()]
    lines = {line[0]: line[1:] for line in cells if line}
    assert shown.stdout.splitlines()[0] == str(directory / "ckpt-5")
    assert lines["layers.0.weight"][-1:] == ["0"]  # the optimizer's
    assert lines["layers.0.bias"] == ["40", "bfloat16", "80", "B", "all"]
    assert lines["model"] == ["4.8", "KiB", "all"]
    assert lines["step"] == ["value", "64", "B", "0"]
    assert "40 × 30" in shown.stdout  # noqa: RUF001
    assert "3 tensors and 4 values in 9 chunks, 2 shards" in shown.stdout
    assert "by 2 ranks" in shown.stdout
    assert newest(directory).attempt in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_show_of_a_directory_is_its_newest(directory: Path) -> None:
    assert run("show", directory).stdout == run("show", directory / "ckpt-5").stdout


def test_show_as_json(directory: Path) -> None:
    shown = json.loads(run("show", directory, "--json").stdout)
    assert (shown["path"], shown["number"], shown["world_size"]) == (str(directory / "ckpt-5"), 5, 2)
    assert shown["nbytes"] == newest(directory).nbytes == sum(shard["size"] for shard in shown["shards"])
    for shard in shown["shards"]:
        assert (a_shard(directory).parent / shard["file"]).stat().st_size == shard["size"]
    keys = {key["key"]: key for key in shown["keys"]}
    weight = keys["model.layers.0.weight"]
    assert (weight["shape"], weight["dtype"], weight["nbytes"]) == ([40, 30], "float32", 4800)
    assert weight["path"] == ["model", "layers.0.weight"]
    assert [(chunk["rank"], chunk["offset"], chunk["length"]) for chunk in weight["chunks"]] == [
        (0, [0, 0], [20, 30]),
        (1, [20, 0], [20, 30]),
    ]
    content = a_shard(directory).read_bytes()
    first = weight["chunks"][0]
    assert content[first["position"] : first["position"] + first["size"]] == torch.ones(20, 30).numpy().tobytes()
    assert keys["loader@1.cursor"]["ranks"] == [1]


def test_show_of_many_ranks_stays_short(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"state": PerRankValues(list(range(20)))}, ranks=20)
    shown = run("show", tmp_path).stdout
    assert "and 4 more ranks" in shown
    assert len(json.loads(run("show", tmp_path, "--json").stdout)["shards"]) == 20


def test_control_characters_in_keys_are_not_printed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"\x1b[31mred[bold]": 1})
    shown = run("show", tmp_path).stdout
    assert "\x1b" not in shown
    assert "?[31mred[bold]" in shown


def test_show_of_a_damaged_checkpoint_is_status_1(directory: Path) -> None:
    flip(a_shard(directory).with_name("index.arrow"), 700)
    assert_one_sentence(run("show", directory), 1, "index.arrow")


# ---- verify -------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run whose checkpoints all have content."""
    for number in (4, 5):
        write_checkpoint(tmp_path, number, a_tree(), ranks=2)
    append_state(open_store(tmp_path), lambda state: State(active=state.active[1:], preserved=state.active[:1]))
    return tmp_path


def test_verify_of_a_checkpoint(whole: Path) -> None:
    result = run("verify", whole / "ckpt-5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("ckpt-5  good  ")
    assert "2 shards, 7 keys" in result.stdout


def test_verify_of_a_directory_is_all_active_and_preserved(whole: Path) -> None:
    result = run("verify", whole)
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["ckpt-4", "good"], ["ckpt-5", "good"]]


def test_verify_tells_all_damage_and_goes_on(whole: Path) -> None:
    for file in whole.glob("ckpt-4/*/*.arrow"):
        flip(file, file.stat().st_size // 2)
    a_shard(whole).unlink()
    result = run("verify", whole)
    assert result.exit_code == 1
    assert "ckpt-4  DAMAGED" in result.stdout
    assert "ckpt-5  DAMAGED" in result.stdout
    told = "".join(result.stdout.split())
    assert str(a_shard_path(whole)) in told
    assert "index.arrow" in told


def a_shard_path(directory: Path) -> Path:
    return directory / "ckpt-5" / newest(directory).attempt / "00000-0.arrow"


def test_verify_as_json(whole: Path) -> None:
    flip(a_shard(whole), a_shard(whole).stat().st_size - 9)
    result = run("verify", whole, "--json")
    assert result.exit_code == 1
    good, bad = json.loads(result.stdout)
    assert (good["path"], good["good"], good["damages"]) == (str(whole / "ckpt-4"), True, [])
    assert (bad["path"], bad["good"], bad["shards"], bad["keys"]) == (str(whole / "ckpt-5"), False, 2, 7)
    assert {damage["path"] for damage in bad["damages"]} == {str(a_shard(whole))}


def test_verify_of_a_copy_without_its_directory(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    alone = tmp_path_factory.mktemp("copies") / "kept"
    (whole / "ckpt-5").rename(alone)
    result = run("verify", alone)
    assert result.exit_code == 0
    assert result.stdout.startswith("kept  good")


def test_verify_tells_a_damaged_log_entry(whole: Path) -> None:
    write_checkpoint(whole, 6, {"step": 6})
    flip(whole / names.entry_path(4), 20)
    result = run("verify", whole)
    assert result.exit_code == 1
    assert "_log  DAMAGED" in result.stdout
    assert names.entry_path(4) in "".join(result.stdout.split())
    assert "ckpt-5  good" in result.stdout


# ---- as a program -------------------------------------------------------------------------------------------------


def test_it_runs_as_a_program(whole: Path) -> None:
    def program(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distckpt.cli", *map(str, args)], capture_output=True, text=True, check=False
        )

    good = program("verify", whole)
    assert (good.returncode, good.stderr) == (0, "")
    flip(a_shard(whole), 600)
    bad = program("verify", whole / "ckpt-5")
    assert (bad.returncode, bad.stderr) == (1, "")
    none = program("ls", whole / "nowhere")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("Error: ")
    usage = program("--help")
    assert usage.returncode == 0
    assert all(command in usage.stdout for command in ("Usage: distckpt", "ls", "show", "verify"))


def test_ls_imports_nothing_heavy(whole: Path) -> None:
    script = (
        "import sys; from distckpt.cli import main; main(['ls', sys.argv[1]], standalone_mode=False); "
        "print([name for name in ('torch', 'ray', 'pyarrow', 'fsspec', 'gcsfs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(whole)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_300, "99.9 KiB"),
        (102_400, "100 KiB"),
        (1_048_575, "1.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (1 << 62, "4.0 EiB"),
        (1 << 73, "8192 EiB"),
    ],
)
def test_human_bytes(nbytes: int, shown: str) -> None:
    assert human_bytes(nbytes) == shown


@pytest.mark.parametrize(("numbers", "shown"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_number_ranges(numbers: list[int], shown: str) -> None:
    assert number_ranges(numbers) == shown
