"""Rank processes for measurements: real processes in one gloo group, each of which calls one function and is gone."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIME_LIMIT = 400.0
EXIT_SECONDS = 20.0


class RankError(RuntimeError):
    """A rank failed; the text is the end of what it said."""


def run_ranks(size: int, function: str, logs: Path, **arguments: Any) -> list[Any]:
    """Call ``module:function(**arguments)`` in ``size`` new processes; their results, in order of rank.

    Logs and results pass through ``logs``. Raises RankError if a rank fails or they take longer than TIME_LIMIT seconds.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ray_folder = tempfile.mkdtemp(prefix="dc-")  # a Ray that somebody else runs on this host must not be joined
    environment = _environment(size, ray_folder)
    processes = [_start(rank, function, logs, arguments, environment) for rank in range(size)]
    try:
        return [_result(rank, process, logs, time.monotonic() + TIME_LIMIT) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            _end(process)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _environment(size: int, ray_folder: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {
        **inherited,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": ray_folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    rank: int, function: str, logs: Path, arguments: dict[str, Any], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    result = logs / f"rank-{rank}.json"
    result.unlink(missing_ok=True)
    with (logs / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, function, json.dumps(arguments), str(result)],
            stdout=log,
            stderr=log,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )


def _result(rank: int, process: subprocess.Popen[bytes], logs: Path, deadline: float) -> Any:
    result = logs / f"rank-{rank}.json"
    while not result.exists():
        ended = process.poll() is not None and not result.exists()
        if ended or time.monotonic() > deadline:
            why = f"ended with {process.returncode}" if ended else f"was not done after {TIME_LIMIT:g} s"
            log = (logs / f"rank-{rank}.log").read_text(errors="replace")
            raise RankError(f"rank {rank} {why}:\n{log[-3000:]}")
        time.sleep(0.05)
    return json.loads(result.read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(function: str, arguments: str, result: str) -> None:
    import ray
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, name = function.split(":")
    answer = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    dist.barrier()
    Path(f"{result}.new").write_text(json.dumps(answer))
    os.replace(f"{result}.new", result)
    if dist.get_rank() != 0:
        time.sleep(0.5)  # rank 0 holds the rendezvous and Ray; whoever leaves after it complains
    ray.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
