"""Rank processes that tests drive: real processes in a real gloo group, told by one JSON line each what to run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.support.warm import WarmProcess, run_script, warm

ROOT = Path(__file__).parents[2]


class RankError(AssertionError):
    """A function that a rank ran raised; the text is its traceback."""


def free_port() -> int:
    """A TCP port that was free a moment ago, of those that no connection is given as its own and no part of Ray takes."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(rank: int, size: int, port: int, more: Mapping[str, str]) -> dict[str, str]:
    """What a launcher tells that rank."""
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **told, **meeting, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_script_on_ranks(
    size: int, script: str | Path, *arguments: object, env: Mapping[str, str], timeout: float = 140
) -> list[subprocess.CompletedProcess[str]]:
    """``torchrun --nproc-per-node SIZE script arguments...``, without the imports; how each rank has ended."""
    port = free_port()
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(
                lambda rank: run_script(script, *arguments, env=environment(rank, size, port, env), timeout=timeout),
                range(size),
            )
        )


@dataclass
class Gang:
    """``size`` processes, each one rank. Use as a context manager; ``run`` calls a function on all of them.

    ``hosts`` has a command for each rank that runs another command on that rank's host; none means: all on this one.
    """

    size: int
    env: Mapping[str, str] = field(default_factory=dict)
    hosts: Sequence[Sequence[str]] = ()
    processes: list[subprocess.Popen[str] | WarmProcess] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def __enter__(self) -> Gang:
        self._start_ranks()
        return self

    def _start_ranks(self) -> None:
        port = free_port()
        folder = Path(tempfile.mkdtemp(prefix="distckpt-gang-"))
        for rank in range(self.size):
            env = environment(rank, self.size, port, self.env)
            self.logs.append(folder / f"rank-{rank}.log")
            with self.logs[-1].open("w") as log:
                self.processes.append(
                    self._on_host(rank, env, log)
                    if self.hosts
                    else warm().start("support.gang:serve", {}, log.fileno(), env)
                )

    def _on_host(self, rank: int, env: dict[str, str], log: IO[str]) -> subprocess.Popen[str]:
        command = [*self.hosts[rank], sys.executable, "-m", "tests.support.gang"]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=ROOT
        )

    def __exit__(self, *_: object) -> None:
        self.stop()

    def renew(self) -> None:
        """New processes in place of those that there are, whatever they are at."""
        for process in self.processes:
            process.kill()
        self.stop()
        self.processes.clear()
        self.logs.clear()
        self._start_ranks()

    def start(self, function: str, **arguments: Any) -> None:
        """Have every rank that lives call ``tests.<module>:<name>`` with these arguments."""
        for process in self.processes:
            if process.poll() is None and process.stdin is not None:
                process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
                process.stdin.flush()

    def result(self, rank: int) -> Any:
        """What the function returned on that rank. RankError if it raised or the process died."""
        process = self.processes[rank]
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise RankError(f"rank {rank}: {answer['error']}")
                return answer["result"]
        raise RankError(f"rank {rank} ended with {process.wait()}: {self.logs[rank].read_text()[-3000:]}")

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Call the function on every rank and return the results in order of rank."""
        self.start(function, **arguments)
        return [self.result(rank) for rank in range(self.size)]

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one rank's process, by default the one that nobody can catch."""
        self.processes[rank].send_signal(sig)

    def stop(self) -> None:
        """End every process that this gang started."""
        for process in self.processes:
            if process.stdin is not None and not process.stdin.closed:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    continue  # it died with a line unread; nothing is left to tell it
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def serve() -> None:
    """Be a rank: carry out what stdin says until it ends."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log, not between the answers
    dist.init_process_group("gloo")
    for line in sys.stdin:
        asked = json.loads(line)
        module, name = asked["function"].split(":")
        try:
            function = getattr(importlib.import_module(f"tests.{module}"), name)
            answer: dict[str, Any] = {"result": function(**asked["arguments"])}
        except BaseException:  # noqa: BLE001 - reported to the test, which raises it
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # leave the group without the barrier that a dead peer would never join


if __name__ == "__main__":
    serve()
