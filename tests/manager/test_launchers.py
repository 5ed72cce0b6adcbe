"""How people start many ranks: torchrun without torch.distributed; with it is in test_process.

Ray Train is in test_integrations.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distckpt
from tests.support.gang import ROOT, Gang, RankError


@pytest.mark.long
@pytest.mark.timeout(150)
def test_torchrun_without_torch_distributed_and_with_a_ray_cluster(ray_address: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray_address}
    script = str(ROOT / "tests" / "ranks" / "programs" / "plain.py")
    done = subprocess.run(
        [*command, script, str(tmp_path)], env=env, capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said == [{"before": None, "latest": f"{tmp_path}/ckpt-2"}] * 2
    with distckpt.open(f"{tmp_path}/ckpt-2") as reader:
        assert reader.manifest.world_size == 2
    assert distckpt.load(f"{tmp_path}/ckpt-2")["state"]["step"] == 2


def test_ranks_restore_and_train_while_ray_does_not_answer_yet(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(state={"weight": torch.ones(4)}), tmp_path) as manager:
        manager.save(5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Gang(2, {"RAY_ADDRESS": address}) as gang:
            restored = gang.run("ranks.manager:restored_meanwhile", directory=str(tmp_path))
            for rank in range(2):
                gang.kill(rank)
    assert restored == [{"path": f"{tmp_path}/ckpt-5", "weight": [1.0] * 4, "opened": False}] * 2


def test_a_ray_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    """Its sockets would have names that are too long."""
    with Gang(2, {"RAY_TMPDIR": f"{tmp_path}/{'long' * 30}", "RAY_ADDRESS": ""}) as gang:
        gang.start("ranks.saves:hold", directory=str(tmp_path / "run"))
        for rank in (0, 1):
            with pytest.raises(
                RankError, match=r"UnavailableError: rank 0: Ray cannot be started on this host\. It says: OSE"
            ):
                gang.result(rank)
