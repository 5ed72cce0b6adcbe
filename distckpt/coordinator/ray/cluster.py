"""The Ray cluster in which the coordinator lives: joined, or started for this run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.exceptions

from distckpt.coordinator.ray.detached import NAMESPACE
from distckpt.coordinator.ray.node import Started, start_cluster, start_node
from distckpt.coordinator.ray.process import apart
from distckpt.errors import CoordinatorUnavailableError
from distckpt.world import World

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 120.0
CONNECT_SECONDS = 2.0
SHARE_SECONDS = 300.0
"""How long the others wait until rank 0 has joined, or started, a Ray cluster."""
RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
RECONNECT_SECONDS = 7 * 86400
"""How long a rank waits for a Ray cluster to come back. Ray's own default ends the process after a minute."""
NOT_JOINED = (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError)
"""What ``ray.init`` raises when there is no cluster to join."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a process needs to join the cluster that another has joined, and what that one knows of it.

    ``home`` is the id of the node where coordinators are started, ``nodes`` are the addresses of all nodes. ``mode`` and
    ``token`` are how to authenticate. ``folder`` is where Ray keeps its files, if the cluster was started by distckpt;
    ``is_loopback`` if such a one is for this host alone.
    """

    address: str
    home: str = ""
    nodes: tuple[str, ...] = ()
    mode: str = ""
    token: str = ""
    folder: str = ""
    is_loopback: bool = False


def join_cluster(world: World) -> str:
    """Connect this rank to the Ray cluster in which the coordinator lives. A collective where ranks share.

    Returns the id of the node where a coordinator is to be started: rank 0's where ranks share, so that it does not
    depend on which rank comes first. Rank 0 keeps the connection it has, or joins the cluster that RAY_ADDRESS or
    ``ray start`` names, or starts one that lives as long as its process. The others follow it; one on a host without
    Ray starts Ray's node there. May be called in any thread, and leaves the process as it was.

    Raises CoordinatorUnavailableError, on all ranks what rank 0 could not do.
    """
    if world.share is None:
        if not ray.is_initialized():
            _join_the_users(world)
        return ray.get_runtime_context().get_node_id()
    if world.council is None:
        said = world.share(_offer([""]) if world.rank == 0 else "", SHARE_SECONDS)
    else:
        said = world.council.consult(_place(), _offer, SHARE_SECONDS)
    offer = json.loads(said)
    if "problem" in offer:
        raise CoordinatorUnavailableError(f"rank 0: {offer['problem']}")
    access = Access(**offer["access"])
    if not ray.is_initialized():
        _follow(access, world.rank, offer["firsts"])
    return access.home


# ---- rank 0 ---------------------------------------------------------------------------------------------------------


def _offer(places: Sequence[str]) -> str:
    """Join or start a cluster for ranks at these places; how to join it too, and the first rank at each place."""
    try:
        if not ray.is_initialized():
            _connect_or_start(alone=len(set(places)) == 1)
        firsts = sorted({places.index(place) for place in places})
        return json.dumps({"access": dataclasses.asdict(_access()), "firsts": firsts})
    except Exception as error:  # all ranks raise it, and none of them waits for rank 0
        logger.debug("rank 0 cannot join or start Ray", exc_info=True)
        ours = isinstance(error, CoordinatorUnavailableError)
        return json.dumps({"problem": str(error) if ours else f"{type(error).__name__}: {error}"})


def _connect_or_start(alone: bool) -> None:
    given = os.environ.get("RAY_ADDRESS")
    own = not given and not _is_noted_cluster_alive()
    try:
        if own:
            _join_own(alone)
        else:
            # "auto" finds the noted one and, unlike its address, the token that goes with it.
            _connect(Access(given or "auto"))
    except NOT_JOINED as error:
        where = "that was started for this run" if own else f"at {given}" if given else "that was started on this host"
        raise CoordinatorUnavailableError(
            f"Ray {where} cannot be joined: {_told(error)}. Start it again, or take it away (`ray stop`, and RAY_ADDRESS "
            "out of the environment), and a cluster is started for this run"
        ) from error


def _join_own(alone: bool) -> None:
    """Join the cluster of this process: the one that it has started before, if that can still be used, else a new one."""
    global _started
    with _starting:
        if _started is not None and _started.lives and (alone or not _started.is_loopback):
            with contextlib.suppress(*NOT_JOINED):
                _connect(_access_to(_started))
                return
        if _started is not None:
            _started.keeper.terminate()
        _started = start_cluster(alone)
        _connect(_access_to(_started))


def _access_to(started: Started) -> Access:
    return Access(started.address, "", (), started.mode, started.token, started.folder, started.is_loopback)


_started: Started | None = None
_starting = threading.Lock()


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


def _access() -> Access:
    """How another process joins the cluster that this one has joined."""
    context = ray.get_runtime_context()
    nodes = tuple(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    address, home = context.gcs_address, context.get_node_id()
    if _started is not None and _started.address == address:
        return dataclasses.replace(_access_to(_started), home=home, nodes=nodes)
    mode, token = _credentials()
    return Access(address, home, nodes, mode, token)


def _credentials() -> tuple[str, str]:
    """With which this process has joined the cluster of somebody else.

    Ray turns token authentication on by itself for a cluster that ``ray.init`` starts, and leaves the token in its home
    directory, which other hosts may not share.
    """
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # a compiled module

    if get_authentication_mode() != AuthenticationMode.TOKEN:
        return os.environ.get("RAY_AUTH_MODE", ""), ""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return "token", os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")


# ---- all ranks ------------------------------------------------------------------------------------------------------


def _place() -> str:
    """Names the loopback interface and the files of this process: the same for those that can meet there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:
        return socket.gethostname()


def _join_the_users(world: World) -> None:
    """Ranks that cannot share meet in a cluster that the user has started."""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _connect(Access(address))
    except NOT_JOINED as error:
        raise CoordinatorUnavailableError(
            f"rank {world.rank} of {world.size}: these ranks meet in a Ray cluster, and there is none to join "
            f"{'on this host' if address == 'auto' else f'at {address}'}: {_told(error)}. Start one (`ray start --head`, then "
            "`ray start --address=...` on the other hosts, or RAY_ADDRESS); or call torch.distributed.init_process_group "
            "before the manager is made, and none is needed"
        ) from error


def _follow(access: Access, rank: int, firsts: Sequence[int]) -> None:
    """Connect to rank 0's cluster. A host of its own needs a Ray node first, which its first rank starts."""
    deadline = time.monotonic() + FOLLOW_SECONDS
    # ray.init itself looks for a node on this host for a minute before it says that there is none.
    started = rank in firsts and not any(_is_here(node) for node in access.nodes)
    if started:
        _start_node(access)
    while True:
        try:
            _connect(access)
        except NOT_JOINED as error:
            if time.monotonic() > deadline:
                raise CoordinatorUnavailableError(
                    f"rank {rank} cannot join Ray at {access.address}, which rank 0 has joined: {_told(error)}. Ray's ports "
                    "must be open between the hosts"
                ) from error
            if rank in firsts and not started:
                _start_node(access)
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


def _start_node(access: Access) -> None:
    try:
        start_node(access.address, access.folder, access.mode, access.token)
    except (CoordinatorUnavailableError, OSError) as error:
        logger.warning("starting a Ray node on this host failed: %s", error)


def _connect(access: Access) -> None:
    """Join the cluster, and let the environment be as it was. Training must not end because Ray does."""

    def join() -> None:
        os.environ.setdefault(RECONNECT_VARIABLE, str(RECONNECT_SECONDS))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else some versions warn of what is to come
        if access.token:
            os.environ.update(RAY_AUTH_MODE=access.mode, RAY_AUTH_TOKEN=access.token)
        elif access.mode:
            os.environ.setdefault("RAY_AUTH_MODE", access.mode)
        _follow_environment()
        with _reachable_at_loopback() if access.is_loopback else contextlib.nullcontext():
            ray.init(address=access.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)

    apart(join)


def _follow_environment() -> None:
    # Ray read its settings when it was imported; this is how its own ray.init makes them follow the environment.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a compiled module

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _reachable_at_loopback() -> Iterator[None]:
    """Ray takes 127.0.0.1 for the host's other address, unless RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 when it is imported."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _told(error: BaseException) -> str:
    """What an error of Ray's says, and what it comes from."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return ": ".join(dict.fromkeys(line for each in causes if (line := str(each).strip().partition("\n")[0])))
