"""Train a small network in JAX over all devices: ``trains_jax.py DIRECTORY STEPS``. Prints the loss of each step.

It saves after each, and goes on where the newest checkpoint is.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import distckpt
from distckpt.integrations.jax import JaxState


class Moments(NamedTuple):
    """What the optimizer keeps."""

    count: jax.Array
    mean: Any


def begin() -> dict[str, Any]:
    """Everything that training has, laid over the devices."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    rows, whole = NamedSharding(mesh, PartitionSpec("devices")), NamedSharding(mesh, PartitionSpec())
    first, second, key = jax.random.split(jax.random.key(3), 3)
    params = {
        "in": jax.device_put(jax.random.normal(first, (8, 16)), rows),
        "out": jax.device_put(jax.random.normal(second, (16, 4)).astype(jnp.bfloat16), whole),
    }
    mean = jax.tree.map(jnp.zeros_like, params)
    return {"params": params, "optimizer": Moments(jnp.zeros((), jnp.int32), mean), "key": key, "step": 0}


@jax.jit
def train(params: Any, optimizer: Moments, key: jax.Array) -> tuple[Any, Moments, jax.Array, jax.Array]:
    """One step, with random inputs."""
    key, now = jax.random.split(key)
    batch = jax.random.normal(now, (32, 8))

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(jnp.tanh(batch @ params["in"]) @ params["out"].astype(jnp.float32) - 1))

    loss, slopes = jax.value_and_grad(loss_of)(params)
    mean = jax.tree.map(lambda old, new: (0.9 * old + new).astype(old.dtype), optimizer.mean, slopes)
    params = jax.tree.map(lambda old, by: (old - 0.1 * by).astype(old.dtype), params, mean)
    return params, Moments(optimizer.count + 1, mean), key, loss


def main(directory: str, steps: int) -> None:
    """Train up to that step."""
    state = JaxState(begin())
    with distckpt.CheckpointManager(distckpt.Checkpoint(train=state), directory, max_to_keep=None) as manager:
        manager.restore_or_initialize()
        layout = jax.tree.map(lambda leaf: str(leaf.sharding), state.value["params"])
        assert layout == jax.tree.map(lambda leaf: str(leaf.sharding), begin()["params"])
        while state.value["step"] < steps:
            now = state.value
            params, optimizer, key, loss = train(now["params"], now["optimizer"], now["key"])
            state.value = {"params": params, "optimizer": optimizer, "key": key, "step": now["step"] + 1}
            manager.save(now["step"] + 1)
            print(float(loss).hex(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
