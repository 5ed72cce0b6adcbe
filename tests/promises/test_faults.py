"""Ranks and coordinators that die, directories that vanish: the last committed checkpoint loads, the next save works."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

import distckpt
from tests.support.actors import coordinator_pid
from tests.support.gang import Gang
from tests.support.small_runs import until

pytestmark = pytest.mark.timeout(150)


@pytest.mark.usefixtures("connected")
def test_coordinator_killed_between_saves_comes_back(gang2: Gang, tmp_path: Path) -> None:
    held = gang2.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=40)
    assert held[0]["path"] == f"{tmp_path}/ckpt-1"
    os.kill(coordinator_pid(str(tmp_path)), signal.SIGKILL)
    for number in (2, 3):
        results = gang2.run("ranks.saves:held_save", number=number)
        assert [result["error"] for result in results] == ["", ""]
        assert results[0]["path"] == f"{tmp_path}/ckpt-{number}"
    gang2.run("ranks.saves:release")
    assert distckpt.load(f"{tmp_path}/ckpt-2")["state"]["a"].tolist() == [1, 1, 1, 1]


@pytest.mark.usefixtures("connected")
def test_a_coordinator_that_every_rank_has_left_ends_and_the_next_run_starts_another(
    gang2: Gang, tmp_path: Path
) -> None:
    gang2.run("ranks.saves:hold", directory=str(tmp_path))
    pid = coordinator_pid(str(tmp_path))
    gang2.run("ranks.saves:release")
    assert until(lambda: not psutil.pid_exists(pid), 30)
    gang2.run("ranks.saves:hold", directory=str(tmp_path))
    assert coordinator_pid(str(tmp_path)) != pid
    results = gang2.run("ranks.saves:held_save", number=2)
    assert [result["path"] for result in results] == [f"{tmp_path}/ckpt-2"] * 2
    gang2.run("ranks.saves:release")


@pytest.mark.long
@pytest.mark.usefixtures("connected")
def test_coordinator_killed_again_and_again_during_saves(gang2: Gang, tmp_path: Path) -> None:
    gang2.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=40, max_to_keep=None)
    last = 1
    for delay in (0.0, 0.005, 0.015, 0.03):
        last += 1
        pid = coordinator_pid(str(tmp_path))
        gang2.start("ranks.saves:held_save", number=last)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        results = [gang2.result(rank) for rank in range(2)]
        assert [result["error"] for result in results] == ["", ""]
    gang2.run("ranks.saves:release")
    numbers = [record.rpartition("-")[2] for record in paths_of(tmp_path)]
    assert numbers == [str(number) for number in range(1, last + 1)]
    for number in numbers:
        with distckpt.open(f"{tmp_path}/ckpt-{number}") as reader:
            assert reader.verify().damages == ()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_inside_the_coordinator_refuses_who_waits_and_the_next_save_works(
    gang2: Gang, tmp_path: Path, rank: int
) -> None:
    gang2.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=40)
    for result in gang2.run("ranks.faults:fail_the_coordinator", number=2, rank=rank):
        assert result["heard"].startswith("CoordinatorFailedError: ")
        assert "the coordinator failed with TypeError: " in result["heard"]
        assert result["path"] == f"{tmp_path}/ckpt-3"
    gang2.run("ranks.saves:release")
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-3"


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("instead", ["nothing", "an empty one"])
def test_a_directory_that_is_gone_is_not_made_again_by_the_next_coordinator(
    gang2: Gang, tmp_path: Path, instead: str
) -> None:
    folder = tmp_path / "run"
    gang2.run("ranks.saves:hold", directory=str(folder), save_timeout=40)
    os.kill(coordinator_pid(str(folder)), signal.SIGKILL)
    folder.rename(tmp_path / "away")
    if instead == "an empty one":
        folder.mkdir()
    for result in gang2.run("ranks.saves:held_save", number=2):
        assert result["error"].startswith("DirectoryLostError")
        assert "deleted or unmounted, or another is in its place" in result["error"]
    assert list(tmp_path.rglob("run/*")) == []
    if instead == "an empty one":
        folder.rmdir()
    (tmp_path / "away").rename(folder)
    for result in gang2.run("ranks.saves:held_save", number=3):
        assert result["path"] == f"{folder}/ckpt-3", result
    gang2.run("ranks.saves:release")
    assert paths_of(folder) == [f"{folder}/ckpt-1", f"{folder}/ckpt-3"]


def paths_of(directory: Path) -> list[str]:
    state = distckpt.get_checkpoint_state(directory)
    assert state is not None
    return list(state.all_model_checkpoint_paths)


def test_a_process_that_leaves_its_ray_cluster_is_told_so_and_may_come_back(gang2: Gang, tmp_path: Path) -> None:
    gang2.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=40)
    for told in gang2.run("ranks.faults:leave_ray_in_a_save", number=2, rank=0):
        assert told["error"].startswith("CoordinatorUnavailableError")
        assert "has left its Ray cluster (ray.shutdown)" in told["error"]
        assert told["seconds"] < 20
    gang2.run("ranks.faults:join_ray")
    for result in gang2.run("ranks.saves:held_save", number=3):
        assert result["path"] == f"{tmp_path}/ckpt-3"
    gang2.run("ranks.saves:release")


@pytest.mark.wide(3)
@pytest.mark.parametrize("moment", ["staging", "writing", "written"])
def test_a_rank_killed_during_a_save(ray_address: str, tmp_path: Path, moment: str) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        gang.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=4)
        gang.start("ranks.faults:save_and_die", number=2, rank=1, moment=moment)
        survivor = gang.result(0)
        gang.processes[1].wait(30)
        assert survivor["error"].startswith("MissingRanksError")
        assert "rank 1" in survivor["error"]
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-1"
    with distckpt.open(f"{tmp_path}/ckpt-1") as reader:
        assert reader.verify().damages == ()


def test_resume_on_three_after_a_rank_died_in_a_save(ray_address: str, gang3: Gang, tmp_path: Path) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        before = gang.run("ranks.saves:save", directory=str(tmp_path), kind="fsdp", number=5)
        gang.run("ranks.saves:hold", directory=str(tmp_path / "other"))
        gang.start("ranks.faults:save_and_die", number=2, rank=0, moment="writing")
        gang.processes[0].wait(30)
    after = gang3.run("ranks.saves:restore", directory=str(tmp_path), kind="fsdp")
    for result in after:
        assert result["path"] == f"{tmp_path}/ckpt-5"
        assert result["digest"] == before[0]["digest"]
    saved = gang3.run("ranks.saves:save", directory=str(tmp_path), kind="fsdp", number=6)
    assert saved[0]["path"] == f"{tmp_path}/ckpt-6"


def test_an_older_run_is_turned_away(ray_address: str, tmp_path: Path) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as old, Gang(2, {"RAY_ADDRESS": ray_address}) as new:
        old.run("ranks.saves:hold", directory=str(tmp_path))
        new.run("ranks.saves:hold", directory=str(tmp_path))
        for result in old.run("ranks.saves:held_save", number=7):
            assert result["error"].startswith("StaleRunError")
        for result in new.run("ranks.saves:held_save", number=2):
            assert result["path"] == f"{tmp_path}/ckpt-2"
        new.run("ranks.saves:release")
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-2"
    assert not (tmp_path / "ckpt-7").exists() or not list((tmp_path / "ckpt-7").glob("*/manifest.json"))


def test_damage_on_one_rank_makes_all_fall_back(gang2: Gang, tmp_path: Path) -> None:
    before = gang2.run("ranks.saves:save", directory=str(tmp_path), kind="fsdp", number=1)
    gang2.run("ranks.saves:save", directory=str(tmp_path), kind="fsdp", number=2, steps=3)
    shard = next((tmp_path / "ckpt-2").glob("*/00001-0.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for result, expected in zip(
        gang2.run("ranks.saves:restore", directory=str(tmp_path), kind="fsdp"), before, strict=True
    ):
        assert result["path"] == f"{tmp_path}/ckpt-1"
        assert result["digest"] == expected["digest"]


def test_a_directory_that_is_not_shared_is_found_out(gang2: Gang, tmp_path: Path) -> None:
    for result in gang2.run("ranks.faults:save_elsewhere", directory=str(tmp_path)):
        assert result["error"].startswith("NotSharedError")
        assert "rank 1 (" in result["error"]
