"""Ray on this host: the cluster, or the node of one, that distckpt starts, and that ends with this process."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distckpt.coordinator.ray import keeper
from distckpt.coordinator.ray.process import users_environment
from distckpt.coordinator.ray.starter import OBJECT_STORE_BYTES
from distckpt.errors import CoordinatorUnavailableError

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
LOOPBACK = "127.0.0.1"
TEMPORARY = "/tmp"
LONGEST_TEMPORARY = 27
"""Bytes of a folder below which Ray's sockets can have names; those of Linux have at most 107."""

SETTINGS = {
    "RAY_worker_niceness": "0",  # by default Ray runs actors at 15: on CPUs that training keeps busy, hardly ever
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",  # a worker that has made an export ends, rather than wait for another
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""For Ray's processes, unless the user has set them: none that waits for work, none that listens to anybody with metrics."""

_STARTER = "import sys; sys.path[:] = sys.argv[4:]; from distckpt.coordinator.ray import starter; starter.start(*sys.argv[1:4])"


@dataclass(frozen=True, slots=True)
class Started:
    """A cluster that this process has started. ``folder`` is where Ray keeps its files, which nobody else may enter."""

    address: str
    folder: str
    mode: str
    token: str = field(repr=False)
    keeper: subprocess.Popen[str] = field(repr=False)

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from this host alone."""
        return self.address.startswith(f"{LOOPBACK}:")

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as far as this process knows."""
        return self.keeper.poll() is None


def start_cluster(alone: bool) -> Started:
    """Start a cluster for this run; ``alone`` if all ranks are on this host, so that no other need reach it.

    Ray gives its parts half a minute to start, which may be too short on a busy host, so it gets a second try.
    CoordinatorUnavailableError says what Ray said.
    """
    try:
        return _start_cluster(alone, "1")
    except CoordinatorUnavailableError as error:
        logger.warning("trying once more: %s", error)
        return _start_cluster(alone, "")


def _start_cluster(alone: bool, spare: str) -> Started:
    folder = _new_folder()
    given = users_environment()
    mode = given.get("RAY_AUTH_MODE", "token")
    token = given.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    env = {**SETTINGS, **given, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-c", _STARTER, LOOPBACK if alone else "", folder, spare, *sys.path]
    process = _keep(command, env, folder)
    return Started((Path(folder) / "address").read_text(), folder, mode, token, process)


def start_node(address: str, folder: str, mode: str, token: str) -> None:
    """Start a node of the cluster at ``address`` on this host, which has none. ``folder`` is the cluster's own, or ""."""
    own = folder
    try:
        os.makedirs(folder, mode=0o700)
    except OSError:  # it is there, or none was named
        own = _new_folder()
    flags = [f"--address={address}", "--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    flags += ["--include-log-monitor=false", "--disable-usage-stats", "--dashboard-agent-listen-port=0"]
    flags += ["--min-worker-port=0", "--max-worker-port=0"]
    credentials = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token} if token else {}
    _keep(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *flags], {**SETTINGS, **os.environ, **credentials}, own
    )


def _new_folder() -> str:
    """A folder for this process alone, with a short name."""
    parent = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or TEMPORARY
    if len(parent) > LONGEST_TEMPORARY and "RAY_TMPDIR" not in os.environ:
        parent = TEMPORARY
    os.makedirs(parent, exist_ok=True)
    return tempfile.mkdtemp(prefix="dc-", dir=parent)


def _keep(command: Sequence[str], env: Mapping[str, str], folder: str) -> subprocess.Popen[str]:
    """The keeper of what ``command`` has started. It and its folder are gone if the command fails, which is raised."""
    log = Path(folder) / "start.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), folder, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=dict(env),
            text=True,
            start_new_session=True,  # signals to the training's group, from a keyboard or torchrun, are not for Ray
        )
    assert process.stdout is not None
    with process.stdout as told, selectors.DefaultSelector() as waiting:
        waiting.register(told, selectors.EVENT_READ)
        ready = bool(waiting.select(START_SECONDS))
        status = told.readline().strip() if ready else ""
    if status == "0":
        _keepers.append(process)
        return process
    reason = log.read_text().strip()
    logger.debug("Ray cannot be started on this host: %s", reason)
    process.terminate()
    process.wait()
    raise CoordinatorUnavailableError(
        f"Ray cannot be started on this host{'' if ready else f' within {START_SECONDS:g} s'}. It says: "
        f"{reason.rpartition(chr(10))[2] or 'nothing'}. RAY_TMPDIR names the folder for its files, if that is what it is about"
    )


_keepers: list[subprocess.Popen[str]] = []
"""Of this process, so that none is taken for one that nobody waits for."""
