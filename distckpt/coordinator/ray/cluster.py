"""The Ray cluster in which the coordinator lives: joined, or started for this run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from distckpt.coordinator.ray.actor import NAMESPACE
from distckpt.errors import CoordinatorUnavailableError
from distckpt.world import World

logger = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 100 << 20
FOLLOW_SECONDS = 120.0
CONNECT_SECONDS = 2.0
SHARE_SECONDS = 300.0
"""How long the others wait until rank 0 has joined, or started, a Ray cluster."""
RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
RECONNECT_SECONDS = 7 * 86400
"""How long a rank waits for a Ray cluster to come back. Ray's own default ends the process after a minute."""
NICENESS_VARIABLE = "RAY_worker_niceness"
COORDINATOR_NICENESS = 0
"""By its own default Ray runs actors at niceness 15. On CPUs that training keeps busy they would hardly ever run."""


def join_cluster(world: World) -> str:
    """Connect this rank to the Ray cluster in which the coordinator lives. A collective where ranks share.

    Returns the id of the node where a coordinator is to be started: rank 0's where ranks share, so that it does not
    depend on which rank comes first. Rank 0 keeps the connection it has, or joins the cluster that RAY_ADDRESS or
    ``ray start`` names, or starts one that lives as long as its process. The others follow it; one on a host without
    Ray starts Ray's node there.
    """
    with _random_numbers_kept():
        return _joined_by(world)


def _joined_by(world: World) -> str:
    if world.share is None:
        if not ray.is_initialized():
            _connect(os.environ.get("RAY_ADDRESS") or "auto")
        return ray.get_runtime_context().get_node_id()
    if world.rank == 0 and not ray.is_initialized():
        _connect_or_start()
    access = json.loads(world.share(json.dumps(_access()) if world.rank == 0 else "", SHARE_SECONDS))
    if not ray.is_initialized():
        _follow(access, world)
    return str(access["home"])


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Ray draws its ids from Python's random numbers, which are the training's, and the same on all ranks if seeded so."""
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def _access() -> dict[str, Any]:
    """What another process needs to reach the cluster that this one is connected to: its nodes, and which is our home.

    Ray turns token authentication on by itself for a cluster that ``ray.init`` starts, in the environment of that
    process alone, and leaves the token in its home directory, which other hosts may not share.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token = ""
    if mode == "token":
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    context = ray.get_runtime_context()
    home = context.get_node_id()
    return {"address": context.gcs_address, "home": home, "nodes": nodes, "mode": mode, "token": token}


def _adopt(access: dict[str, Any]) -> None:
    """Authenticate as the process does that has told us."""
    if access["mode"] and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = access["mode"]
        if access["token"]:
            os.environ.setdefault("RAY_AUTH_TOKEN", access["token"])
        _follow_environment()


def _follow_environment() -> None:
    # Ray read its settings when it was imported; this is how its own ray.init makes them follow the environment.
    from ray._raylet import Config  # type: ignore[attr-defined]  # a compiled module

    Config.initialize("")


def _outlive_ray() -> None:
    """Training must not end because Ray does; it goes on, and its saves fail with what is wrong."""
    os.environ.setdefault(RECONNECT_VARIABLE, str(RECONNECT_SECONDS))
    _follow_environment()


def _connect_or_start() -> None:
    given = os.environ.get("RAY_ADDRESS")
    if not given and not _is_noted_cluster_alive():
        _start_local()
        return
    try:
        # "auto" finds the noted one and, unlike its address, the token that goes with it.
        _connect(given or "auto")
    except (ConnectionError, RuntimeError) as error:
        where = given or "the cluster that was started on this host"
        raise CoordinatorUnavailableError(f"Ray at {where} cannot be joined: {error}") from error


def _is_noted_cluster_alive() -> bool:
    """Whether the cluster that ``ray start`` left a note of on this host answers. ray.init would try it for minutes."""
    from ray._private.utils import read_ray_address  # the note has no public reader but ray.init itself

    host, _, port = (read_ray_address() or "").rpartition(":")
    if not host:
        return False
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError):
        logger.info("the Ray cluster noted at %s:%s does not answer; starting one for this run", host, port)
        return False
    return True


def _connect(address: str) -> None:
    _outlive_ray()
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)


def _start_local() -> None:
    """Start a cluster for this run. Ray gives its parts 15 s to start, which may be too short on a busy host: twice."""
    _outlive_ray()
    os.environ.setdefault(NICENESS_VARIABLE, str(COORDINATOR_NICENESS))
    try:
        _start_cluster()
    except Exception as error:  # noqa: BLE001 - Ray raises nothing more particular
        logger.warning("Ray did not start on this host, trying once more: %s", error)
        try:
            _start_cluster()
        except Exception as again:
            raise CoordinatorUnavailableError(f"Ray cannot be started on this host: {again}") from again


def _start_cluster() -> None:
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _follow(access: dict[str, Any], world: World) -> None:
    """Connect to rank 0's cluster. A host of its own needs a Ray node first, which its first rank starts."""
    _adopt(access)
    address = access["address"]
    deadline = time.monotonic() + FOLLOW_SECONDS
    # ray.init itself looks for a node on this host for a minute before it says that there is none.
    started = int(os.environ.get("LOCAL_RANK", "0")) == 0 and not any(_is_here(node) for node in access["nodes"])
    if started:
        _start_node(address)
    while True:
        try:
            _connect(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() > deadline:
                raise CoordinatorUnavailableError(f"rank {world.rank} cannot join Ray at {address}: {error}") from error
            if int(os.environ.get("LOCAL_RANK", "0")) == 0 and not started:
                _start_node(address)
                started = True
            time.sleep(1.0)
        else:
            return


def _is_here(address: str) -> bool:
    """Whether an address belongs to this host: no other can be bound."""
    try:
        family, kind, _, _, name = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(name)
    except OSError:
        return False
    return True


def _start_node(address: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1"]
    command.append(f"--object-store-memory={LOCAL_OBJECT_STORE_BYTES}")
    env = {NICENESS_VARIABLE: str(COORDINATOR_NICENESS), **os.environ}
    if env.get(RECONNECT_VARIABLE) == str(RECONNECT_SECONDS):
        del env[RECONNECT_VARIABLE]  # training outlives Ray; a node must not outlive its cluster
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        logger.warning("starting a Ray node on this host failed: %s", (done.stderr or done.stdout).strip()[-500:])
