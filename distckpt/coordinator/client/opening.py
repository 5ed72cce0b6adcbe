"""From nothing to an open run: the coordinator is found or started, in this process or as a Ray actor.

Ranks that can consult each other begin at once, and find the coordinator behind their first steps. Rank 0 looks at the
directory before, so that what cannot be used is said where the manager is made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.client.error_text import from_text, to_text
from distckpt.coordinator.client.line import Line, LocalLine
from distckpt.coordinator.messages import OpenRun, RunOpened
from distckpt.coordinator.shell.housekeeping import probe_with_room
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.directory.chosen import refuse_checkpoint
from distckpt.directory.garbage import Watch
from distckpt.directory.strays import read_run
from distckpt.errors import CoordinatorError, DistckptError
from distckpt.storage import Store
from distckpt.storage.node import met
from distckpt.terminal.sizes import counted
from distckpt.world import Council, World, new_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the ranks of a run agree on when they make a manager together.

    ``token`` names the run, ``directory`` is rank 0's spelling of it, ``hosts`` are where ranks are, as far as known.
    ``council`` is for what they decide without a coordinator; None if they cannot.
    """

    token: str
    directory: str
    hosts: Mapping[int, str]
    council: Council | None


def meet(store: Store, world: World) -> Meeting:
    """Agree with all ranks. A collective where ranks share.

    Raises, where ranks can consult each other, on all of them what rank 0 finds wrong with the directory:
    LogMissingError, DamagedError, StorageError, StoreUnsuitableError. AbsentRanksError names ranks that do not come.
    """
    if world.council is None or world.size == 1:
        token = _agreed_token(world)
        # Rank 0's spelling names the coordinator: where a path leads through links may differ from host to host.
        directory = store.url if world.share is None else world.share(store.url)
        return Meeting(_unused(store.url, token), directory, {world.rank: world.host}, None)
    said = json.loads(world.council.consult(world.host, lambda hosts: _first_look(store, world.token, hosts)))
    if said["problem"]:
        raise from_text(said["problem"])
    hosts = dict(enumerate(said["hosts"]))
    met(hosts.values(), world.host)
    return Meeting(_unused(store.url, said["token"]), said["directory"], hosts, world.council.apart(said["id"]))


def _agreed_token(world: World) -> str:
    if world.token is not None:
        return world.token
    if world.share is None:
        raise ValueError("give run_id: these ranks have no other way to know which incarnation of the job they are")
    return world.share(new_token())


def _first_look(store: Store, token: str | None, hosts: Sequence[str]) -> str:
    """Rank 0 looks for all, before anybody does anything else."""
    problem = ""
    try:
        probe_with_room(store, Watch(store))
        read_run(store)
    except DistckptError as error:
        problem = to_text(error)
    except Exception as error:  # noqa: BLE001 - the others wait for an answer
        problem = to_text(CoordinatorError(f"{store.url}: rank 0 cannot use it: {type(error).__name__}: {error}"))
    unique = new_token()
    said = {"id": unique, "token": token or unique, "directory": store.url, "hosts": hosts, "problem": problem}
    return json.dumps(said)


def client_of(
    store: Store,
    storage_options: dict[str, Any] | None,
    world: World,
    meeting: Meeting,
    opening: OpenRun,
    settings: Settings,
    check: Callable[[], object],
) -> Client:
    """The client of the directory's coordinator, which is found or started.

    A world of one has its coordinator in the process; more ranks meet at a Ray actor, for which rank 0 joins the
    running Ray cluster or starts one on its host. Where the ranks can consult each other, all that happens in another
    thread, and the client's users wait for it; else the run is open on return. What ``check`` raises then keeps the run
    from being used. ValueError for a directory that is a checkpoint of another.
    """
    refuse_checkpoint(store, storage_options)
    opening = dataclasses.replace(opening, token=meeting.token)

    def opened(run: RunOpened) -> None:
        check()
        if world.rank == 0:
            logger.info("%s opened for run %d, of %s", store.url, run.run, counted(world.size, "rank"))

    if world.size == 1:
        client = Client(lambda: _local_line(store, settings), opening, opened)
        client.connect()
        client.open()
        return client
    council = meeting.council
    if council is not None:
        behind = council.apart("opening", behind=True)
        share = functools.partial(_share, behind)
        world = dataclasses.replace(world, share=share, council=behind)
    client = Client(lambda: _ray_line(meeting.directory, storage_options, world, settings), opening, opened)
    _in_turn(client.connect)
    if council is None:
        client.open()
    return client


def _share(council: Council, text: str, timeout: float | None = None) -> str:
    return council.consult(text or "-", lambda _: text, timeout)


def _local_line(store: Store, settings: Settings) -> Line:
    shell = Shell(store, dataclasses.replace(settings, idle_timeout=None))
    try:
        shell.start()
    except BaseException:
        shell.close()
        raise
    return LocalLine(shell)


def _ray_line(directory: str, storage_options: dict[str, Any] | None, world: World, settings: Settings) -> Line:
    # Here, because importing Ray takes a second that nobody need wait for.
    from distckpt.coordinator.ray.cluster import join_cluster
    from distckpt.coordinator.ray.line import RayLine

    return RayLine(directory, storage_options, settings, join_cluster(world))


def _in_turn(connect: Callable[[], None]) -> None:
    """Call ``connect`` in a thread that calls one after the other.

    Ranks make their managers in the same order, and to join Ray is a collective: so they join in that order too. The
    thread never ends, for Ray's processes end with the thread that has started them.
    """
    global _turns, _turns_of
    with _lock:
        if _turns is None or _turns_of != os.getpid():
            _turns, _turns_of = queue.SimpleQueue(), os.getpid()
            threading.Thread(target=_take_turns, args=(_turns,), name="distckpt-opening", daemon=True).start()
        _turns.put(connect)


def _take_turns(turns: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        turns.get()()


_turns: queue.SimpleQueue[Callable[[], None]] | None = None
_turns_of = 0
_lock = threading.Lock()


def _unused(directory: str, token: str) -> str:
    """The token of a run of its own for each manager: ranks that were given one for all would hear old answers again."""
    with _lock:
        _tokens[directory, token] += 1
        count = _tokens[directory, token]
    return token if count == 1 else f"{token}/{count}"


_tokens: Counter[tuple[str, str]] = Counter()
