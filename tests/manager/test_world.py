"""How a process finds out which rank it is, whoever has started it; and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import TCPStore

import distckpt
from distckpt.errors import CoordinatorUnavailableError, LaunchError
from distckpt.world import find_rank, find_world
from tests.support.gang import Gang

LAUNCHERS = [
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
    {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "1"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"},
    {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
    {"PMI_RANK": "1", "PMI_SIZE": "2"},
]
launchers = pytest.mark.parametrize("told", LAUNCHERS, ids=lambda told: next(iter(told)))


def tell(monkeypatch: pytest.MonkeyPatch, told: dict[str, str]) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@launchers
def test_ranks_that_cannot_find_each_other_are_no_worlds_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: dict[str, str]
) -> None:
    tell(monkeypatch, told)
    with pytest.raises(LaunchError, match=r"rank 1 of 2 .*init_process_group") as raised:
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path)
    assert next(iter(told)) in str(raised.value)
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, rank=0, world_size=1) as manager:
        path = manager.save(1).result(10)
    distckpt.Checkpoint(a=2).restore(path).assert_consumed()  # needs nobody else


@launchers
def test_with_a_run_id_they_are_who_the_launcher_says(monkeypatch: pytest.MonkeyPatch, told: dict[str, str]) -> None:
    tell(monkeypatch, told)
    world = find_world(run_id="job-1")
    assert (world.rank, world.size, world.token) == (1, 2, "job-1")
    assert find_rank() == (1, 2)


def test_a_rank_that_is_told_no_number_of_ranks_is_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "3")
    with pytest.raises(LaunchError, match="PMIx says that this is rank 3 of several"):
        find_world(run_id="job-1")
    monkeypatch.setenv("PMIX_RANK", "0")
    assert find_world().size == 1


def test_one_that_was_started_alone_within_a_larger_job_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(
        monkeypatch,
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    )
    assert find_world().size == 1
    assert find_rank() == (0, 1)


def test_ranks_by_number_need_a_run_id(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="give run_id too"):
        distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, rank=0, world_size=2)


def test_a_store_of_torch_that_has_gone_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    tell(monkeypatch, {**told, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    world = find_world(timeout=5)
    assert world.share is not None
    del server
    with pytest.raises(CoordinatorUnavailableError, match=r"rank 1: the store .* has ended"):
        world.share("")
    with pytest.raises(CoordinatorUnavailableError, match="does not answer"):
        find_world(timeout=1)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", ["by number", "by torch"])
def test_ranks_with_no_ray_to_join_are_told_what_to_do(tmp_path: Path, how: str) -> None:
    impatient = dict.fromkeys(
        (
            "RAY_gcs_rpc_server_connect_timeout_s",
            "RAY_gcs_rpc_server_reconnect_timeout_s",
            "RAY_py_gcs_connect_timeout_s",
        ),
        "1",
    )  # Ray looks for its cluster for 40 s otherwise
    with Gang(2, {"RAY_ADDRESS": "127.0.0.1:9", **impatient}) as gang:
        for said in gang.run("ranks.manager:without_ray", directory=str(tmp_path), by_number=how == "by number"):
            assert said["kind"] == "CoordinatorUnavailableError"
            assert "127.0.0.1:9" in said["text"]
            assert ("`ray start --head`" if how == "by number" else "a cluster is started for this run") in said["text"]


def test_of_ranks_that_decide_together_rank_0_hears_all(gang2: Gang) -> None:
    assert gang2.run("ranks.manager:consult") == ["0 1", "0 1"]
