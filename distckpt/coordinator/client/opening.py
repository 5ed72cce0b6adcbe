"""From nothing to an open run: the coordinator is found or started, in this process or as a Ray actor."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.client.line import LocalLine
from distckpt.coordinator.messages import OpenRun
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.errors import FencedError
from distckpt.storage import Store
from distckpt.world import World, new_token


def open_client(
    store: Store, storage_options: dict[str, Any] | None, world: World, opening: OpenRun, settings: Settings
) -> Client:
    """Find or start the coordinator of the store's directory and report to it. A collective where ranks share.

    A world of one has its coordinator in the process; more ranks meet at a Ray actor, for which rank 0 joins the
    running Ray cluster or starts one on its host.
    """
    token = world.token
    if token is None:
        if world.share is None:
            raise ValueError("give run_id: these ranks have no other way to know which incarnation of the job they are")
        token = world.share(new_token())
    opening = dataclasses.replace(opening, token=_unused(store.url, token))
    if world.size == 1:
        shell = Shell(store, dataclasses.replace(settings, idle_timeout=None))
        try:
            shell.start()
            return _opened(Client(LocalLine(shell), opening))
        except BaseException:
            shell.close()  # or it would go on claiming the directory that its maker has given up
            raise
    # Here, because importing Ray takes a second that a world of one need not wait for.
    from distckpt.coordinator.ray.cluster import join_cluster
    from distckpt.coordinator.ray.line import RayLine

    # Rank 0's spelling names the coordinator: where a path leads through links may differ from host to host.
    directory = store.url if world.share is None else world.share(store.url)
    line = RayLine(directory, storage_options, settings, join_cluster(world))
    try:
        return _opened(Client(line, opening))
    except FencedError:
        # The actor served a run that another cluster took over from; ours is newer than both.
        line.replace()
        return _opened(Client(line, opening))


def _unused(directory: str, token: str) -> str:
    """The token of a run of its own for each manager: ranks that were given one for all would hear old answers again."""
    with _tokens_lock:
        _tokens[directory, token] += 1
        count = _tokens[directory, token]
    return token if count == 1 else f"{token}/{count}"


_tokens: Counter[tuple[str, str]] = Counter()
_tokens_lock = threading.Lock()


def _opened(client: Client) -> Client:
    client.open()
    return client
