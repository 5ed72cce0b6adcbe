"""What a job's start costs: ten steps of a two-rank torchrun script, with distckpt, with DCP, and with neither.

This file is both: what the ranks run, and who starts them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 10
TIME_LIMIT = 300.0
RAY = (sys.executable, "-m", "ray.scripts.scripts")
BUSY = (sys.executable, "-c", "while True: pass")


@dataclass(frozen=True, slots=True)
class Start:
    """One job: seconds of opening and restoring on the slower rank, and of all of it; what runs beside the ranks."""

    ready: float
    whole: float
    processes: int
    megabytes: float


def start(kind: str, folder: Path, environment: dict[str, str]) -> Start:
    """Run the script once. ``kind`` is distckpt, dcp or neither."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, kind, str(folder / kind), str(result)],
        env=environment,
        check=False,
        timeout=TIME_LIMIT,
        capture_output=True,
        text=True,
    )
    whole = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"{kind} failed: {done.stderr[-4000:]}")
    found = json.loads(result.read_text())
    return Start(found["ready"], whole, found["processes"], found["megabytes"])


@contextlib.contextmanager
def surroundings(what: str) -> Iterator[dict[str, str]]:
    """The environment of a job on this host: with no Ray, with a cluster that runs already, or with busy CPUs."""
    ray_folder = tempfile.mkdtemp(prefix="dc-")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
    busy = [subprocess.Popen(BUSY) for _ in range(os.cpu_count() or 1)] if what == "busy CPUs" else []
    if what == "a cluster":
        head = [*RAY, "start", "--head", "--num-cpus=1", "--include-dashboard=false", f"--temp-dir={ray_folder}"]
        subprocess.run(head, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield environment
    finally:
        for process in busy:
            process.kill()
            process.wait()
        if what == "a cluster":
            _end_cluster(ray_folder)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _end_cluster(ray_folder: str) -> None:
    """Not ``ray stop``, which ends every cluster of the host."""
    for pid in _processes_of(ray_folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # some of it would wait for ever for the rest, at any other


def _processes_of(ray_folder: str) -> list[int]:
    """Processes of the Ray cluster whose files are in that folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                environment, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
                is_ray = b"ray" in command and b"torch.distributed.run" not in command and b"starting.py" not in command
                if is_ray and (ray_folder.encode() in environment or ray_folder.encode() in command):
                    found.append(int(entry.name))
    return found


def _megabytes(pid: int) -> float:
    """Memory of a process, with its share of what it has in common with others."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _train(kind: str, folder: str, result: str) -> None:
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    dist.barrier()
    begin = time.monotonic()
    with {"distckpt": _with_distckpt, "dcp": _with_dcp, "neither": _with_neither}[kind](
        model, optimizer, folder
    ) as save:
        ready = torch.tensor(time.monotonic() - begin)
        for _ in range(STEPS):
            model(torch.ones(64, 256)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        save()
        if dist.get_rank() == 0:
            ray = _processes_of(os.environ["RAY_TMPDIR"])
            said = {"processes": len(ray), "megabytes": sum(map(_megabytes, ray))}
        dist.barrier()
    dist.all_reduce(ready, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps({"ready": ready.item(), **said}))
    dist.destroy_process_group()


@contextlib.contextmanager
def _with_distckpt(model: Any, optimizer: Any, folder: str) -> Iterator[Any]:
    import distckpt

    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model, optimizer=optimizer), folder) as manager:
        manager.restore_or_initialize()
        yield lambda: manager.save().result()  # type: ignore[union-attr]


@contextlib.contextmanager
def _with_dcp(model: Any, optimizer: Any, folder: str) -> Iterator[Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    if Path(folder).exists():
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    def save() -> None:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)

    yield save


@contextlib.contextmanager
def _with_neither(model: Any, optimizer: Any, folder: str) -> Iterator[Any]:
    yield lambda: None


if __name__ == "__main__":
    _train(*sys.argv[1:])
