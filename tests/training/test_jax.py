"""JAX, in processes of its own: where it has been imported, it objects to any fork.

A program that trains goes on bit for bit where it was, on any number of devices of one host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import distckpt
from distckpt.cli.app import main
from tests.support.gang import ROOT
from tests.support.warm import run_script

PROGRAM = ROOT / "tests" / "ranks" / "programs" / "trains_jax.py"


@pytest.mark.timeout(400)
def test_what_is_said_of_jax_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", ROOT / "tests" / "training" / "in_jax.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=390,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def train(directory: Path, steps: int, devices: int) -> list[float]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = run_script(PROGRAM, directory, steps, env={**os.environ, "PYTHONPATH": str(ROOT), **flags}, timeout=180)
    assert done.returncode == 0, done.stderr
    return [float.fromhex(line) for line in done.stdout.split()]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_training_goes_on_on_as_many_devices_as_there_are(tmp_path: Path) -> None:
    whole = train(tmp_path / "run", 6, 2)
    shutil.copytree(tmp_path / "run", tmp_path / "fewer")
    for directory in ("run", "fewer"):
        later = [f"{tmp_path / directory}/ckpt-{at}" for at in (4, 5, 6)]
        assert CliRunner().invoke(main, ["rm", "--yes", "--force", *later], catch_exceptions=False).exit_code == 0
        assert distckpt.latest_checkpoint(tmp_path / directory) == f"{tmp_path / directory}/ckpt-3"
    assert train(tmp_path / "run", 6, 2) == whole[3:]
    assert train(tmp_path / "fewer", 6, 1) == pytest.approx(whole[3:], rel=1e-3)
    found = distckpt.load(tmp_path / "fewer", "train")
    assert found["step"] == 6
    assert found["params"]["out"].dtype is torch.bfloat16
    assert found["optimizer"]["count"] == 6
