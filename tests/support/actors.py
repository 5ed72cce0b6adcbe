"""The coordinator of a directory, where it is an actor of its own."""

from __future__ import annotations

from typing import Any


def coordinator_pid(directory: str) -> int:
    """The process that it runs in. Needs a connection to its Ray cluster."""
    import ray

    return int(ray.get(_coordinator(directory).describe.remote())[1])


def end_coordinator(directory: str) -> None:
    """Have it end, and not come back; ValueError if there is none."""
    import ray

    ray.kill(_coordinator(directory), no_restart=True)


def _coordinator(directory: str) -> Any:
    import ray

    from distckpt.coordinator.ray.actor import NAMESPACE, actor_name

    return ray.get_actor(actor_name(directory), namespace=NAMESPACE)
