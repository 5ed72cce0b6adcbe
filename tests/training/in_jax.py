"""Played by test_jax.py. JAX: what goes into a checkpoint comes back, or is refused by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distckpt
from distckpt.errors import EncodeError, MismatchError
from distckpt.integrations.jax import JaxState
from tests.support.snippets import play


class Pair(NamedTuple):
    first: Any
    second: Any


def tree(fill: float) -> dict[str, Any]:
    numbers = jnp.arange(6.0).reshape(2, 3) + fill
    kinds = [
        jnp.float16,
        jnp.bfloat16,
        jnp.float8_e4m3fn,
        jnp.float8_e5m2,
        jnp.int8,
        jnp.uint32,
        jnp.bool_,
        jnp.complex64,
    ]
    return {
        "kinds": {jnp.dtype(kind).name: numbers.astype(kind) for kind in kinds},
        "pair": Pair(numbers, [numbers[0], (numbers[1, 2],)]),
        "key": jax.random.key(int(fill)),
        "old key": jax.random.PRNGKey(int(fill)),
        "numpy": np.arange(3) + fill,
        "plain": {"step": int(fill), "name": f"run {fill}"},
        "nothing": None,
        "empty": jnp.zeros((0, 4)),
    }


def bits(value: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(value)
    found: list[Any] = [str(structure)]
    for leaf in leaves:
        data = jax.random.key_data(leaf) if str(getattr(leaf, "dtype", "")).startswith("key<") else leaf
        found.append((str(data.dtype), data.shape, np.asarray(data).tobytes()) if hasattr(data, "dtype") else data)
    return found


def test_every_kind_of_leaf_comes_back(tmp_path: Path) -> None:
    state = JaxState(tree(3))
    with distckpt.CheckpointManager(distckpt.Checkpoint(train=state), tmp_path) as manager:
        manager.save(1).result(30)
        state.value = tree(4)
        manager.restore()
        assert bits(state.value) == bits(tree(3))
        assert isinstance(state.value["pair"], Pair)
        manager.save(2).result(30)
    other = JaxState(tree(5))
    distckpt.Checkpoint(train=other).restore(tmp_path)
    assert bits(other.value) == bits(tree(3))


def test_a_single_array_is_a_tree_too(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(train=JaxState(jnp.arange(3))).save(tmp_path / "one")
    other = JaxState(jnp.zeros(3, jnp.int32))
    distckpt.Checkpoint(train=other).restore(path)
    assert other.value.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"a": jnp.zeros((2, 2)), "b": 1}, r"a \(float32 of shape \(2,\) was saved"),
        ({"a": jnp.zeros(2, jnp.int32), "b": 1}, r"a \(float32 of shape"),
        ({"a": jnp.zeros(2)}, "b"),
        ({"a": jnp.zeros(2), "b": 1, "c": jnp.zeros(1)}, "c"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(1)}, r"b \(it was a int, and is an array here"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_key(here: Any, words: str, tmp_path: Path) -> None:
    path = distckpt.Checkpoint(train=JaxState({"a": jnp.ones(2), "b": 1})).save(tmp_path / "run")
    state = JaxState(here)
    with pytest.raises(MismatchError, match=words):
        distckpt.Checkpoint(train=state).restore(path)
    assert state.value is here


def test_what_cannot_be_stored_is_refused_by_key(tmp_path: Path) -> None:
    state = JaxState({"a": jnp.zeros(2, jnp.int4)})
    with (
        distckpt.CheckpointManager(distckpt.Checkpoint(train=state), tmp_path) as manager,
        pytest.raises(EncodeError, match=r"train\.a: tensors of torch\.int4 cannot be stored"),
    ):
        manager.save(1)


def test_a_training_saves_as_the_page_says(tmp_path: Path) -> None:
    def train_step(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "params": jax.tree.map(lambda leaf: leaf + 1, state["params"]), "step": state["step"] + 1}

    names = {"params": {"w": jnp.zeros(3)}, "opt_state": (), "key": jax.random.key(1), "steps": 3}
    play("docs/integrations.md", 4, {**names, "train_step": train_step}, tmp_path)
    found = play("docs/integrations.md", 4, {**names, "train_step": None}, tmp_path)
    assert found["state"].value["step"] == 3
    assert found["state"].value["params"]["w"].tolist() == [3.0, 3.0, 3.0]
