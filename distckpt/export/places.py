"""Where exports are made: never in the training process.

Tracing a program holds Python's interpreter lock for seconds and changes parts of torch that belong to the whole
process: a training loop beside it nearly stands still, and what it compiles meanwhile can fail. So it is done by a Ray
task, or, where there is no Ray, by a child process of this one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Protocol

import msgspec

from distckpt.export.packing import pack
from distckpt.export.task import Order, Outcome, carry_out_aside

LENGTH_BYTES = 8
POLL_SECONDS = 1.0
STOPPED = Outcome("failed", "it was given up, since its manager was closed")
LEFT = Outcome("failed", "the process has left its Ray cluster (ray.shutdown) before its manager was closed")

_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from distckpt.export.child import serve; serve()"


class Place(Protocol):
    """Somewhere to make exports, one at a time."""

    def run(self, order: Order) -> Outcome:
        """Make one and wait for it. Raises nothing that is about the export itself."""

    def stop(self) -> None:
        """End what is under way, and take no more orders. May be called from another thread."""


def find_place(task_options: Mapping[str, Any]) -> Place:
    """Ray, if this process has joined a cluster, else a child process. ``task_options`` are for Ray's ``remote``."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return RayTasks(task_options)
    return ChildProcess()


class ChildProcess:
    """A process of its own that lives as long as its maker, started when it is first needed and again when it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, order: Order) -> Outcome:
        """See Place. A child that ends without an answer has failed."""
        process = self._find()
        if process is None:
            return STOPPED
        answer = _exchange(process, pack(order))
        if answer:
            return msgspec.json.decode(answer, type=Outcome)
        return Outcome("failed", f"the process that makes exports ended with status {process.wait()}")

    def stop(self) -> None:
        """See Place."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _end(self._process)

    def _find(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopped:
                return None
            if self._process is not None and self._process.poll() is not None:
                _end(self._process)
                self._process = None
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CHILD, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the accelerators are the training's
                    start_new_session=True,  # an interrupt from the keyboard is for the training to handle
                )
            return self._process


def _exchange(process: subprocess.Popen[bytes], order: bytes) -> bytes:
    """Its answer; nothing if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(len(order).to_bytes(LENGTH_BYTES, "little") + order)
        process.stdin.flush()
    return process.stdout.readline()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError), process:  # it may have ended with an order half read
        process.kill()


class RayTasks:
    """A task for each export, on any node of the cluster."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        import ray

        # No CPUs are claimed: those that training holds would be waited for until it ends.
        # And its process ends with it: other tasks would find it at low priority, and with much of torch in its memory.
        settings = {"num_cpus": 0, "max_retries": 0, "max_calls": 1, "scheduling_strategy": "SPREAD", **options}
        self._task: Any = ray.remote(**settings)(carry_out_aside)
        self._stopped = threading.Event()

    def run(self, order: Order) -> Outcome:
        """See Place. A worker or node that dies has failed."""
        import ray

        if not ray.is_initialized():
            return LEFT  # else Ray would look for a cluster by itself, and start one if it finds none
        task = self._task.remote(order)
        future = task.future()  # a thread may never return from ray.wait when its process leaves the cluster meanwhile
        while not self._stopped.is_set():
            try:
                outcome: Outcome = future.result(POLL_SECONDS)
            except FutureTimeoutError:
                if not ray.is_initialized():
                    return LEFT
            except ray.exceptions.RayError as error:
                return Outcome("failed", f"{type(error).__name__}: {error}")
            else:
                return outcome
        ray.cancel(task, force=True)
        return STOPPED

    def stop(self) -> None:
        """See Place."""
        self._stopped.set()
