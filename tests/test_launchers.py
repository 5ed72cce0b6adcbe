"""The ways in which people start many ranks: torchrun, with and without torch.distributed. Ray Train is in test_integrations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import distckpt
from tests.gang import ROOT


@pytest.mark.timeout(150)
@pytest.mark.parametrize("group", ["gloo", "none"])
def test_torchrun_without_a_ray_cluster(tmp_path: Path, group: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ray_folder = tempfile.mkdtemp(prefix="dc-")  # a short name, in which no other test's cluster is noted
    script = str(ROOT / "tests" / "programs" / "plain.py")
    done = subprocess.run(
        [*command, script, str(tmp_path), group],
        env={**env, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": ray_folder},
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said == [{"before": None, "latest": f"{tmp_path}/ckpt-2", "niceness": 0}] * 2
    with distckpt.open(f"{tmp_path}/ckpt-2") as reader:
        assert reader.manifest.world_size == 2
    assert distckpt.load(f"{tmp_path}/ckpt-2")["state"]["step"] == 2
