"""Played by test_jax.py. JAX: what goes into a checkpoint comes back, or is refused by its key."""

from __future__ import annotations

import contextlib
from functools import partial
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

PAGE = (partial(play, "docs/coming-from-orbax.md", 0), partial(play, "docs/coming-from-orbax.md", 1))


class Stopped(Exception):
    """Training was made to fail."""


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


def test_what_a_compiled_function_made_arrays_of_is_again_what_the_program_begins_with(tmp_path: Path) -> None:
    def fresh() -> dict[str, Any]:
        array = np.ones((3,), np.float32)
        return {"array": array, "number": np.float32(2), "step": 0, "rate": 0.5, "half": np.ones(2, jnp.bfloat16)}

    @jax.jit
    def train(value: dict[str, Any]) -> dict[str, Any]:
        return {name: leaf * 2 + 1 for name, leaf in value.items()}

    saved = JaxState(train(fresh()))
    distckpt.Checkpoint(train=saved).write(tmp_path / "run")
    state = JaxState(fresh())
    distckpt.Checkpoint(train=state).restore(tmp_path / "run")
    assert {name: type(leaf) for name, leaf in state.value.items()} == {
        name: type(leaf) for name, leaf in fresh().items()
    }
    assert bits(train(state.value)) == bits(train(saved.value))


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"a": np.zeros((2, 2)), "b": 1}, r"a \(shape \(2,\) was saved, and \(2, 2\) is here"),
        ({"a": 1.0, "b": 1}, r"a \(shape \(2,\) was saved, and \(\) is here"),
        ({"a": "text", "b": 1}, r"a \(it was an array, and is a str here"),
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Orbax, and of what it is made of
def test_both_programs_of_the_page_go_on_where_they_failed_with_the_same_losses(tmp_path: Path) -> None:
    def loss_of(params: dict[str, Any], step: int) -> Any:
        return jnp.square(params["w"] @ jnp.full(4, 0.1 * step)).mean()

    def play_both(folder: str, stop: int | None) -> list[dict[int, float]]:
        said: list[dict[int, float]] = []

        def train_step(state: dict[str, Any]) -> dict[str, Any]:
            step = int(state["step"])
            if step == stop:
                raise Stopped
            loss, slope = jax.value_and_grad(loss_of)(state["params"], step)
            said[-1][step] = float(loss)
            moved = jax.tree.map(lambda old, by: 0.9 * old + by, state["opt_state"], slope)
            params = jax.tree.map(lambda old, by: old - 0.01 * by, state["params"], moved)
            return {"params": params, "opt_state": moved, "step": step + 1}

        params = {"w": jnp.arange(12.0).reshape(3, 4)}
        names = {"params": params, "opt_state": jax.tree.map(jnp.zeros_like, params), "steps": 25}
        names["train_step"] = train_step
        for number, page in enumerate(PAGE):
            said.append({})
            with contextlib.suppress(Stopped):
                page(names, tmp_path / folder / str(number))
        return said

    whole = play_both("whole", None)
    assert whole[0] == whole[1]
    assert [*whole[0]] == [*range(25)]
    first, then = play_both("parts", 17), play_both("parts", None)
    for before, after in zip(first, then, strict=True):
        assert [*after] == [*range(10, 25)]
        assert {**before, **after} == whole[0]
