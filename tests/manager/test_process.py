"""The user's process stays the user's, whatever has started it: handlers, hooks, environment, logging, random numbers.

Ray Train's workers are in test_integrations.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import distckpt
from tests.support.gang import ROOT, Gang

PROGRAM = ROOT / "tests" / "ranks" / "process.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment(**more: str) -> dict[str, str]:
    """Ours, without what is told to Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def told(said: str) -> list[list[Any]]:
    """What each process says has changed in it, and what else it says."""
    return [json.loads(line) for line in said.splitlines() if line.startswith("[")]


def test_of_one_process_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "alone", str(tmp_path / "run"), ""]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=55, check=False)
    assert (done.returncode, told(done.stdout)) == (0, [[]]), done.stderr


@pytest.mark.timeout(150)
def test_of_ranks_that_torchrun_starts_and_that_start_ray(tmp_path: Path) -> None:
    """The coordinator has the priority that they have: 0."""
    command = [sys.executable, *TORCHRUN, str(PROGRAM), "torchrun", str(tmp_path / "run"), ""]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=140, check=False)
    assert (done.returncode, sorted(told(done.stdout))) == (0, [[], [], [0], [0]]), done.stderr[-4000:]
    with distckpt.open(tmp_path / "run" / "ckpt-1") as reader:
        assert reader.manifest.world_size == 2


@pytest.mark.long
@pytest.mark.timeout(150)
def test_of_ranks_that_are_spawned(tmp_path: Path, ray_address: str) -> None:
    command = [sys.executable, str(PROGRAM), "spawn", str(tmp_path / "run"), str(tmp_path / "meeting")]
    env = environment(RAY_ADDRESS=ray_address)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=140, check=False)
    assert (done.returncode, told(done.stdout)) == (0, [[], []]), done.stderr[-4000:]


def test_of_ranks_with_the_variables_of_torch(tmp_path: Path, ray_address: str) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        assert gang.run("ranks.process:kept", directory=str(tmp_path / "run")) == [[], []]


def test_of_ranks_that_are_given_by_number(tmp_path: Path, ray_address: str) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        changed = gang.run("ranks.process:kept_by_number", directory=str(tmp_path / "run"), run_id="first")
    assert changed == [[], []]


def test_a_handler_that_is_set_while_ray_is_joined_is_the_one_that_counts(ray_address: str) -> None:
    with Gang(1) as gang:
        assert gang.run("ranks.process:handler_set_meanwhile", address=ray_address) == [[signal.SIGTERM]]
