"""State of JAX programs, saved and restored by the same manager.

state = JaxState({"params": params, "opt_state": opt_state, "key": key})  # any pytree
checkpoint = Checkpoint(train=state)
state.value = train_step(state.value, batch)  # and so on; manager.save(...) saves what it is then
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distckpt.errors import EncodeError, MismatchError

try:
    import jax
    from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
except ImportError as missing:
    raise ImportError("distckpt.integrations.jax needs JAX: pip install 'distckpt[jax]'") from missing

_SIGNED = {1: np.dtype("u1"), 2: np.dtype("<u2")}
"""What NumPy has of the size of dtypes that it does not know, of which torch has namesakes."""


class JaxState:
    """A pytree of JAX arrays, NumPy arrays and plain values, as an object of a Checkpoint. ``value`` is the tree.

    Keys are the names on the way to a leaf: ``train.params.dense.kernel``. Arrays are stored whole as tensors, bit for bit,
    bfloat16 and 8-bit floats too, and keys of random numbers by their data; how they lie on devices is not stored. A
    restore puts each array on the devices of the one that ``value`` has in its place, by that one's sharding, and makes a
    new tree of the same structure: read ``value`` after it. So another number of devices may go on. Where ``value`` has a
    number or an array of NumPy's, and an array of JAX's was saved, as a compiled function makes it of them, it is one again.

    One process has all of it: arrays that span processes are refused by an EncodeError, as is a dtype that torch does not
    have. A tree of another structure, shapes or dtypes is refused by a MismatchError that names the keys.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """All leaves, in dicts by the names on the way to them."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.value)
        tree: dict[str, Any] = {}
        for path, leaf in leaves:
            names = [_name(step) for step in path] or ["value"]
            place = tree
            for name in names[:-1]:
                place = place.setdefault(name, {})
            if names[-1] in place:
                raise EncodeError(".".join(names), "two leaves of the tree have the same names on the way to them")
            place[names[-1]] = _stored(leaf, ".".join(names))
        return tree

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make ``value`` anew of what ``state_dict`` gave."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(self.value)
        found = dict(_flat(state))
        wanted = {tuple(_name(step) for step in path) or ("value",): leaf for path, leaf in leaves}
        misfits = {
            ".".join(names): reason
            for names, leaf in wanted.items()
            if names in found and (reason := _misfit(leaf, found[names]))
        }
        missing = [".".join(names) for names in wanted if names not in found]
        unexpected = [".".join(names) for names in found if names not in wanted]
        if missing or unexpected or misfits:
            raise MismatchError("the tree that was saved", missing, unexpected, misfits)
        self.value = jax.tree_util.tree_unflatten(
            structure, [_live(leaf, found[names]) for names, leaf in wanted.items()]
        )


def _name(step: Any) -> str:
    match step:
        case DictKey(key) | FlattenedIndexKey(key):
            return str(key)
        case SequenceKey(index):
            return str(index)
        case GetAttrKey(name):
            return str(name)
    return str(step)


def _flat(state: Mapping[str, Any], before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, value in state.items():
        found += _flat(value, (*before, name)) if isinstance(value, Mapping) else [((*before, name), value)]
    return found


def _is_random_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any, key: str) -> Any:
    if _is_random_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    if not leaf.is_fully_addressable:
        raise EncodeError(
            key, "the array spans several processes, and one would have to hold all of it: gather it first"
        )
    array: Any = np.asarray(leaf)
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array.copy())  # a view of JAX's memory cannot be written to, which torch would allow
    dtype, size = getattr(torch, array.dtype.name, None), array.dtype.itemsize
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != size or size not in _SIGNED:
        raise EncodeError(key, f"torch has no dtype like {array.dtype}: convert the array before it is saved")
    return torch.from_numpy(array.view(_SIGNED[size]).copy()).view(dtype)


def _misfit(leaf: Any, stored: Any) -> str:
    """Why what is stored cannot take the place of the leaf; empty if it can."""
    data = jax.random.key_data(leaf) if _is_random_key(leaf) else leaf
    if not isinstance(data, jax.Array):
        return _misfit_of_plain(leaf, stored) if isinstance(stored, torch.Tensor) else ""
    if not isinstance(stored, torch.Tensor):
        return f"it was a {type(stored).__name__}, and is an array here"
    kind = str(stored.dtype).removeprefix("torch.")
    if tuple(stored.shape) != data.shape or kind != data.dtype.name:
        return f"{kind} of shape {tuple(stored.shape)} was saved, and {data.dtype.name} of shape {data.shape} is here"
    return ""


def _misfit_of_plain(leaf: Any, stored: torch.Tensor) -> str:
    """As ``_misfit``, of what was an array of JAX's when it was saved, as a compiled function makes one of any number."""
    if not isinstance(leaf, np.ndarray | np.generic | numbers.Number):
        return f"it was an array, and is a {type(leaf).__name__} here"
    shape = leaf.shape if isinstance(leaf, np.ndarray) else ()
    return "" if stored.shape == shape else f"shape {tuple(stored.shape)} was saved, and {shape} is here"


def _plain(leaf: Any, stored: torch.Tensor) -> Any:
    """A saved array in the place of one of NumPy's, or of a number."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return stored.item()
    dtype: Any = jax.numpy.dtype(str(stored.dtype).removeprefix("torch."))
    array = _raw(stored, dtype).view(dtype)
    return array if isinstance(leaf, np.ndarray) else array[()]


def _raw(stored: torch.Tensor, dtype: Any) -> Any:
    raw = stored if dtype.isbuiltin == 1 else stored.view(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    return raw.numpy()


def _live(leaf: Any, stored: Any) -> Any:
    """What is stored, in the place of the leaf."""
    if _is_random_key(leaf):
        return jax.random.wrap_key_data(_live(jax.random.key_data(leaf), stored), impl=jax.random.key_impl(leaf))
    if not isinstance(leaf, jax.Array):
        return _plain(leaf, stored) if isinstance(stored, torch.Tensor) else stored
    dtype: Any = np.dtype(leaf.dtype)
    # What JAX may move to where it is used must stay so: else it fits no array that lies elsewhere.
    return jax.device_put(_raw(stored, dtype).view(dtype), leaf.sharding if leaf.committed else None)
