"""Many ranks, real processes, a real Ray cluster: what is saved on one layout comes back bit for bit on another."""

from __future__ import annotations

from pathlib import Path

import pytest

import distckpt
from tests.support.gang import Gang


@pytest.fixture(scope="session")
def gangs(gang2: Gang, gang3: Gang, gang4: Gang) -> dict[int, Gang]:
    return {2: gang2, 3: gang3, 4: gang4}


@pytest.mark.wide(3)
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        (("fsdp", 2), ("fsdp", 3)),
        (("fsdp", 3), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp", 4)),
        (("hsdp", 4), ("fsdp", 2)),
        (("fsdp", 3), ("hsdp", 4)),
        (("tp", 2), ("fsdp", 3)),
        (("fsdp_tp", 4), ("fsdp", 3)),
        (("fsdp", 3), ("fsdp_tp", 4)),
        (("ddp", 3), ("fsdp", 2)),
        (("fsdp", 4), ("ddp", 2)),
        (("stages", 4), ("stages", 2)),
    ],
)
def test_elastic_resume(
    gangs: dict[int, Gang], tmp_path: Path, saved: tuple[str, int], restored: tuple[str, int]
) -> None:
    before = gangs[saved[1]].run("ranks.saves:save", directory=str(tmp_path), kind=saved[0])
    after = gangs[restored[1]].run("ranks.saves:restore", directory=str(tmp_path), kind=restored[0])
    whole: dict[str, str] = {}
    for result in before:
        whole |= result["digest"]
        assert result["path"] == f"{tmp_path}/ckpt-1"
    for result in after:
        assert result["path"] == f"{tmp_path}/ckpt-1"
        assert result["digest"] == {key: whole[key] for key in result["digest"]}
        assert len(result["digest"]) > 10
    assert [result["cursor"] for result in after] == [-1] * restored[1]


@pytest.mark.timeout(120)
def test_same_world_keeps_what_belongs_to_each_rank(gang3: Gang, tmp_path: Path) -> None:
    before = gang3.run("ranks.saves:save", directory=str(tmp_path), kind="fsdp")
    after = gang3.run("ranks.saves:restore", directory=str(tmp_path), kind="fsdp")
    assert [result["cursor"] for result in after] == [100, 101, 102]
    assert [result["digest"] for result in after] == [result["digest"] for result in before]


@pytest.mark.timeout(120)
def test_replicated_tensors_are_written_once_and_spread(gang3: Gang, tmp_path: Path) -> None:
    gang3.run("ranks.saves:save", directory=str(tmp_path), kind="ddp")
    with distckpt.open(f"{tmp_path}/ckpt-1") as reader:
        sizes = [shard.size for shard in reader.manifest.shards]
        assert len(sizes) == 3
        assert max(sizes) < 1.6 * min(sizes)
        report = reader.verify()
    assert report.damages == ()


@pytest.mark.wide(3)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("options", [{}, {"buffers": 2}, {"on_busy": "skip"}])
def test_saves_overlap_with_training(gang2: Gang, tmp_path: Path, options: dict[str, object]) -> None:
    results = gang2.run(
        "ranks.saves:many_saves", directory=str(tmp_path), kind="fsdp", count=6, max_to_keep=None, **options
    )
    assert results[0]["paths"] == results[1]["paths"]
    saved = [path for path in results[0]["paths"] if path is not None]
    assert saved == results[0]["checkpoints"]
    assert len(saved) == 6 or options.get("on_busy") == "skip"
    for path in saved:
        assert distckpt.load(path)["extra"]["step"] == int(path.rpartition("-")[2])


@pytest.mark.timeout(120)
def test_different_numbers_fail_for_all_and_name_them(gang3: Gang, tmp_path: Path) -> None:
    for result in gang3.run("ranks.saves:save_different_numbers", directory=str(tmp_path)):
        assert result["error"].startswith("NumberMismatchError")
        assert result["path"] == f"{tmp_path}/ckpt-20"


@pytest.mark.timeout(120)
def test_a_rank_that_never_comes_is_named(gang3: Gang, tmp_path: Path) -> None:
    results = gang3.run("ranks.saves:one_rank_stays_away", directory=str(tmp_path), absent=1, timeout=3)
    for rank in (0, 2):
        assert results[rank]["error"].startswith("MissingRanksError")
        assert "rank 1" in results[rank]["error"]
        assert results[rank]["waited"] < 20
    assert {result["last"] for result in results} == {f"{tmp_path}/ckpt-3"}
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-3"


@pytest.mark.timeout(120)
def test_ranks_that_disagree_are_refused_by_name(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.saves:disagree", directory=str(tmp_path)):
        shape, value = result["errors"]
        assert shape.startswith("PlanError")
        assert "state.a" in shape
        assert value.startswith("PlanError")
        assert "state.b" in value
        assert "PerRank" in value


def test_copies_that_drift_apart_are_found_at_the_save_if_that_is_asked_for(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.saves:drift", directory=str(tmp_path / "looked"), check_copies=True):
        assert result["error"].startswith("PlanError")
        assert "state.weights (ranks 0, 1): rank 1 holds another value than rank 0" in result["error"]
    for result in gang2.run("ranks.saves:drift", directory=str(tmp_path / "not"), check_copies=False):
        assert result["error"] == "NoneType: None"


def test_buffers_under_ddp_are_rank_0s_whole(gang3: Gang, tmp_path: Path) -> None:
    """They differ between ranks, and were once taken from whichever rank had least to write."""
    results = gang3.run("ranks.saves:buffers_of_ddp", directory=str(tmp_path))
    assert results[1]["own"] != results[0]["own"]
    for result in results:
        assert result["restored"] == results[0]["own"]
