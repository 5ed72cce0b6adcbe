"""``distckpt du`` and ``distckpt diff``: where the bytes are, and what differs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import crc32c
import pytest
import torch
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.directory.compare import compare, joined
from distckpt.directory.locate import locate, read_index
from tests.support.checkpoints import PerRankValues, write_checkpoint
from tests.support.damage import flip


def run(*args: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, list(map(str, args)))


def a_tree(**changes: Any) -> dict[str, Any]:
    weight = torch.arange(1200.0).reshape(40, 30)
    tree = {"model": {"weight": weight, "bias": torch.zeros(40, dtype=torch.bfloat16)}, "step": 5}
    return {**tree, "loader": PerRankValues([{"cursor": 7}]), **changes}


def difference(one: str | Path, other: str | Path, *args: str) -> dict[str, Any]:
    """What programs get."""
    done = run("diff", one, other, "--json", *args)
    told: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (0 if told["same"] else 1)
    return told


# ---- du -------------------------------------------------------------------------------------------------------------


def test_du_says_what_the_bytes_are_of_which_rank_wrote_them_and_of_which_type(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5, a_tree(loader=PerRankValues([{"cursor": 7}, {"cursor": 9}])), ranks=2)
    told = json.loads(run("du", path, "--json").stdout)
    [one] = told["checkpoints"]
    assert told["stored"] == one["stored"] == json.loads(run("show", path, "--json").stdout)["nbytes"]
    assert told["keys"] == {"model": 4880, "loader": 128, "step": 64}
    assert told["dtypes"] == {"float32": 4800, "bfloat16": 80, "value": 192}
    assert set(told["ranks"]) == {"0", "1"}
    assert told["nbytes"] == 5072 == sum(told["ranks"].values())
    shown = [line.split() for line in run("du", path).stdout.splitlines()]
    assert ["model", "4.8", "KiB", "96.2", "%"] in shown
    assert ["float32", "4.7", "KiB", "94.6", "%"] in shown


def test_du_of_a_directory_is_all_its_checkpoints_and_goes_on_where_one_is_damaged(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, number, a_tree())
    told = json.loads(run("du", tmp_path, "--json").stdout)
    assert [one["checkpoint"] for one in told["checkpoints"]] == ["ckpt-1", "ckpt-2", "ckpt-3"]
    assert told["keys"]["model"] == 3 * 4880
    [index] = tmp_path.glob("ckpt-2/*/index.arrow")
    flip(index, 700)
    damaged = run("du", tmp_path)
    assert damaged.exit_code == 1
    assert "not measured: " in damaged.stdout
    assert ["model", "9.5", "KiB", "97.4", "%"] in [line.split() for line in damaged.stdout.splitlines()]


# ---- diff -----------------------------------------------------------------------------------------------------------


def test_two_that_are_the_same_are_status_0_however_they_were_cut_and_nothing_is_read(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path, 1, a_tree())
    other = write_checkpoint(tmp_path, 2, a_tree(), ranks=3)
    for shard in tmp_path.glob("*/*/*-0.arrow"):
        shard.write_bytes(b"")
    told = difference(one, other)
    assert (told["same"], told["read"], len(told["equal"])) == (True, [], 4)
    assert run("diff", one, other).stdout.splitlines()[-1] == "4 keys the same, 0 with other values"


def test_keys_shapes_types_and_values_that_changed_are_told(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path, 1, a_tree(gone=1))
    weight = torch.arange(1200.0).reshape(40, 30)
    weight[3, 4] += 2
    model = {"weight": weight, "bias": torch.zeros(41, dtype=torch.float16)}
    other = write_checkpoint(tmp_path, 2, a_tree(model=model, step=6, come=1))
    told = difference(one, other)
    assert (told["removed"], told["added"]) == (["gone"], ["come"])
    assert told["changed"] == {"model.bias": {"dtypes": ["bfloat16", "float16"], "shapes": [[40], [41]]}}
    assert told["differing"] == ["model.weight", "step"]
    assert (told["read"], told["values"]) == ([], {})
    told = difference(one, other, "--values")
    assert told["read"] == ["model.weight"]
    norm = float(torch.arange(1200.0, dtype=torch.float64).norm())
    assert told["values"]["model.weight"] == {"norm": 2.0, "of": pytest.approx(norm), "largest": 2.0, "elements": 1}
    shown = run("diff", one, other).stdout.splitlines()
    assert shown[2:] == [
        "- gone",
        "+ come",
        "! model.bias  bfloat16 [40] -> float16 [41]",
        "~ model.weight",
        "~ step",
        "1 key the same, 2 with other values",
    ]
    assert "elements" in run("diff", one, other, "--values").stdout


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_difference_is_found_however_the_two_were_cut(tmp_path: Path, ranks: int) -> None:
    weight = torch.arange(1200.0).reshape(40, 30)
    one = write_checkpoint(tmp_path, 1, {"weight": weight})
    weight[39, 29] = -1
    other = write_checkpoint(tmp_path, 2, {"weight": weight, "wide": torch.ones(2, 2, 2, 2)}, ranks=ranks)
    assert difference(one, other)["differing"] == ["weight"]


def test_chunks_that_are_no_rows_of_the_whole_are_compared_where_both_have_them_and_else_left_open(
    tmp_path: Path,
) -> None:
    weight = torch.arange(1200.0).reshape(40, 30)
    paths = [write_checkpoint(tmp_path, number, {"weight": weight}, ranks=number) for number in (1, 2)]
    one, other = (read_index(locate(path)) for path in paths)
    columns = dataclasses.replace(other, offset=other.offset[:, ::-1], length=other.length[:, ::-1])
    assert compare(one, other).unknown == ()
    assert compare(one, columns).unknown == ("weight",)
    assert compare(columns, columns).same == other.names


def test_nan_that_stays_is_no_difference_and_a_norm_that_is_none_is_null(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path, 1, {"a": torch.tensor([float("nan"), 1.0])})
    other = write_checkpoint(tmp_path, 2, {"a": torch.tensor([float("nan"), 2.0])})
    assert difference(one, write_checkpoint(tmp_path, 3, {"a": torch.tensor([float("nan"), 1.0])}))["same"]
    assert difference(one, other, "--values")["values"]["a"] == {
        "norm": None,
        "of": None,
        "largest": None,
        "elements": 1,
    }


def test_trouble_is_status_2_and_no_difference(tmp_path: Path) -> None:
    one, other = (write_checkpoint(tmp_path, number, a_tree()) for number in (1, 2))
    assert run("diff", one, tmp_path / "ckpt-7").exit_code == 2
    [index] = tmp_path.glob("ckpt-2/*/index.arrow")
    flip(index, 700)
    assert run("diff", one, other).exit_code == 2


@pytest.mark.parametrize(("first", "second"), [(0, 5), (5, 0), (1, 1), (10, 1000), (77, 123_457)])
def test_crcs_of_parts_make_that_of_the_whole(first: int, second: int) -> None:
    one, other = os.urandom(first), os.urandom(second)
    assert joined(crc32c.crc32c(one), crc32c.crc32c(other), second) == crc32c.crc32c(one + other)
