"""Ranks that do not save alike hear of it, and go on together: no save before is held against those that follow."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.gang import Gang
from tests.support.small_runs import numbers


@pytest.mark.wide(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("who", "buffers", "following"), [(0, 1, [3, 4]), (1, 2, [2, 3])])
def test_after_one_rank_saved_alone_joint_saves_work(
    gang2: Gang, tmp_path: Path, who: int, buffers: int, following: list[int]
) -> None:
    arguments = {"directory": str(tmp_path), "who": who, "numbers": following, "buffers": buffers}
    results = gang2.run("ranks.steps:save_alone", **arguments)
    assert [result["outcomes"] for result in results] == [["saved"] * 3] * 2
    assert results[who]["alone"].startswith("MissingRanksError")
    assert f"rank {1 - who} (" in results[who]["alone"]
    assert numbers(tmp_path) == [1, *following]


@pytest.mark.timeout(120)
def test_a_save_that_another_rank_has_left_out_ends_when_that_rank_goes_on(gang2: Gang, tmp_path: Path) -> None:
    first, second = gang2.run("ranks.steps:go_on", directory=str(tmp_path))
    assert first["outcomes"] == second["outcomes"] == ["saved", "saved"]
    assert first["alone"].startswith("NumberMismatchError")
    assert "saves 2" in first["alone"]
    assert "saves 3" in first["alone"]
    assert first["held"] < 50


@pytest.mark.timeout(120)
def test_ranks_that_save_different_numbers_are_named_to_all_and_go_on_together(gang2: Gang, tmp_path: Path) -> None:
    for outcomes in gang2.run("ranks.steps:different_numbers", directory=str(tmp_path)):
        assert outcomes[0] == "saved"
        assert outcomes[1].startswith("NumberMismatchError")
        assert "saves 10" in outcomes[1]
        assert "saves 11" in outcomes[1]
        assert outcomes[2:] == ["saved", "saved"]
    assert numbers(tmp_path) == [1, 20, 21]


@pytest.mark.timeout(120)
def test_an_encode_error_on_one_rank_leaves_all_in_step(gang2: Gang, tmp_path: Path) -> None:
    first, second = gang2.run("ranks.steps:encode_error", directory=str(tmp_path))
    assert first[0] == first[2] == second[0] == second[2] == "saved"
    assert first[1].startswith("RankFailedError")
    assert second[1] == "EncodeError"


@pytest.mark.wide(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("who", [0, 1])
def test_a_manager_that_not_all_ranks_make_fails_soon_and_names_them(gang2: Gang, tmp_path: Path, who: int) -> None:
    results = gang2.run("ranks.steps:make_alone", directory=str(tmp_path), who=who)
    assert results[who]["alone"].startswith("AbsentRanksError")
    assert f"rank {1 - who}" in results[who]["alone"]
    assert results[who]["waited"] < 60
    assert [result["outcomes"] for result in results] == [["saved", "saved"]] * 2


@pytest.mark.timeout(120)
def test_a_save_inside_a_save_is_refused_at_once(gang2: Gang, tmp_path: Path) -> None:
    for heard in gang2.run("ranks.steps:nested_save", directory=str(tmp_path)):
        assert heard.startswith("CoordinatorError")
        assert "save was called while save was running in the same thread" in heard


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", ["planning", "copying"])
def test_a_rank_that_is_interrupted_in_a_save_tells_the_others(gang2: Gang, tmp_path: Path, moment: str) -> None:
    """They would wait for it for ``save_timeout``, ten minutes here."""
    first, second = gang2.run("ranks.steps:interrupted", directory=str(tmp_path), moment=moment)
    assert first["outcomes"] == ["saved", "interrupted", "saved"]
    assert second["outcomes"][0] == second["outcomes"][2] == "saved"
    assert second["outcomes"][1].startswith("RankFailedError: ")
    assert "rank 0 (" in second["outcomes"][1]
    assert "failed: KeyboardInterrupt" in second["outcomes"][1]
    assert numbers(tmp_path) == [1, 3]


@pytest.mark.timeout(120)
def test_a_rank_that_is_interrupted_in_a_restore_tells_the_others(gang2: Gang, tmp_path: Path) -> None:
    first, second = gang2.run("ranks.steps:interrupted_restore", directory=str(tmp_path))
    assert first["outcomes"] == ["saved", "interrupted", f"{tmp_path}/ckpt-1"]
    assert second["outcomes"][1].startswith("RestoreError: ")
    assert "failed: KeyboardInterrupt" in second["outcomes"][1]
    assert second["outcomes"][2] == f"{tmp_path}/ckpt-1"


@pytest.mark.wide(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("who", "run_id"), [(0, None), (1, "first")], ids=["by themselves", "at the coordinator"])
def test_after_one_rank_restored_alone_joint_restores_work(
    ray_address: str, tmp_path: Path, who: int, run_id: str | None
) -> None:
    arguments = {"directory": str(tmp_path / "run"), "meeting": str(tmp_path / "meeting"), "who": who, "run_id": run_id}
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        results = gang.run("ranks.steps:restore_alone", **arguments)
    assert [result["outcomes"] for result in results] == [["saved", "restored", "restored"]] * 2
    assert results[who]["alone"].startswith("MissingRanksError: nothing was restored")
    assert f"for rank {1 - who} (" in results[who]["alone"]


@pytest.mark.wide(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "save",
            "checkpoint 2 was not saved: waited 2 s for rank 1 ({}) to join the save. Every rank must call save, ",
        ),
        (
            "prepare",
            "the save was not prepared: waited 2 s for rank 1 ({}) to join the save. Every rank must call prepare",
        ),
        ("restore", "nothing was restored: waited 2 s for rank 1 ({}) to restore. Every rank must call restore or "),
        ("restore_or_initialize", "nothing was restored: waited 2 s for rank 1 ({}) to restore. Every rank must call "),
    ],
)
def test_a_rank_that_calls_alone_what_all_must_call_is_told_who_is_missing(
    gang2: Gang, tmp_path: Path, what: str, told: str
) -> None:
    first, second = gang2.run("ranks.steps:call_alone", directory=str(tmp_path), what=what, who=0)
    assert first["alone"].startswith(f"MissingRanksError: {told.format(socket.gethostname())}")
    assert first["outcomes"] == second["outcomes"] == ["saved", "saved"]
    assert numbers(tmp_path) == [1, 3]
