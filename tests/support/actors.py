"""The actors of a directory: its coordinator, where it is one, and its watcher. They need a connection to their cluster."""

from __future__ import annotations

import contextlib
from typing import Any


def coordinator_pid(directory: str) -> int:
    """The process that it runs in."""
    import ray

    return int(ray.get(_coordinator(directory).describe.remote())[1])


def end_coordinator(directory: str) -> None:
    """Have it end, and not come back; ValueError if there is none."""
    import ray

    ray.kill(_coordinator(directory), no_restart=True)


def watcher_pid(directory: str) -> int:
    """The process that the watcher runs in; ValueError if there is none."""
    import ray

    return int(ray.get(watcher(directory).describe.remote())[1])


def end_watcher(directory: str) -> None:
    """Have it end, if there is one: it would outlive the test for long."""
    import ray

    with contextlib.suppress(ValueError):
        ray.kill(watcher(directory), no_restart=True)


def watcher(directory: str) -> Any:
    """The watcher; ValueError if there is none."""
    return _actor("watcher", directory)


def _coordinator(directory: str) -> Any:
    return _actor("coordinator", directory)


def _actor(role: str, directory: str) -> Any:
    import ray

    from distckpt.coordinator.ray.detached import NAMESPACE, name_of

    return ray.get_actor(name_of(role, directory), namespace=NAMESPACE)
