"""The coordinator of a directory, where it is an actor of its own."""

from __future__ import annotations


def coordinator_pid(directory: str) -> int:
    """The process that it runs in. Needs a connection to its Ray cluster."""
    import ray

    from distckpt.coordinator.ray.actor import NAMESPACE, actor_name

    actor = ray.get_actor(actor_name(directory), namespace=NAMESPACE)
    return int(ray.get(actor.describe.remote())[1])
