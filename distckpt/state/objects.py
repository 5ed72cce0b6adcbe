"""What there is to save: named objects, and state that belongs to one rank."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
import torch

from distckpt.errors import EncodeError
from distckpt.format import names
from distckpt.format.tree.arrays import is_tensor_array
from distckpt.format.tree.tree import Path, flatten

OnResize = Literal["error", "drop"] | Callable[[list[Any], int, int], Any]

SAVE_COUNTER = "save_counter"


class PerRank:
    """State that belongs to one rank, such as a data cursor or random numbers. Never deduplicated between ranks.

    ``obj`` is anything that Checkpoint takes. ``on_resize`` says what happens when another number of ranks restores:
    "error" raises ResizeError, "drop" leaves the object as it is (as it was before a newer checkpoint was tried and refused,
    for which its tensors are read into new memory first), and a callable gets the saved values of all ranks
    in order, this rank and the new world size, and returns this rank's value.
    """

    def __init__(self, obj: Any, on_resize: OnResize = "error") -> None:
        if not callable(on_resize) and on_resize not in ("error", "drop"):
            raise ValueError(f'on_resize must be "error", "drop" or a callable, not {on_resize!r}')
        self.obj = obj
        self.on_resize = on_resize

    def __repr__(self) -> str:
        return f"PerRank({self.obj!r}, on_resize={self.on_resize!r})"


class RandomState:
    """The random number generators of this process: Python's, NumPy's, torch's, and every CUDA device's.

    Has ``state_dict`` and ``load_state_dict``. Wrap it in PerRank: every rank draws its own numbers.
    """

    def state_dict(self) -> dict[str, Any]:
        """The generators' states as plain values and tensors."""
        name, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": {"name": str(name), "key": key, "pos": position, "has_gauss": has_gauss, "cached_gaussian": gauss},
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = {str(device): value for device, value in enumerate(torch.cuda.get_rng_state_all())}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put every generator where it was. CUDA states of devices that are not here are left out."""
        random.setstate(state["python"])
        saved = state["numpy"]
        key = np.asarray(saved["key"], dtype=np.uint32)
        np.random.set_state((saved["name"], key, saved["pos"], saved["has_gauss"], saved["cached_gaussian"]))
        torch.set_rng_state(state["torch"].cpu())
        for device, value in state.get("cuda", {}).items():
            if int(device) < torch.cuda.device_count():
                torch.cuda.set_rng_state(value.cpu(), int(device))


def is_array(obj: object) -> TypeGuard[torch.Tensor | np.ndarray[Any, Any]]:
    """Whether ``obj`` is stored as raw bytes with dtype and shape. Arrays of which torch knows no dtype are plain values."""
    return issubclass(type(obj), torch.Tensor) or is_tensor_array(obj)


def is_stateful(obj: object) -> bool:
    """Whether ``obj`` gives and takes its state by ``state_dict`` and ``load_state_dict``. A class has none of its own."""
    return (
        not isinstance(obj, type)
        and callable(getattr(obj, "state_dict", None))
        and callable(getattr(obj, "load_state_dict", None))
    )


def wrapped_in(obj: Any) -> Any:
    """The object itself, whether it belongs to one rank or to all."""
    return obj.obj if isinstance(obj, PerRank) else obj


class NamedObjects:
    """Objects that are saved and restored together, each under its name, and the counter of their saves.

    The objects are attributes; what is assigned to one takes its place, or is one more. ``exclude`` and
    ``only_trainable`` say what of them is left out, ``frozen_from`` where that comes from: see Checkpoint.
    """

    def __init__(
        self,
        *,
        exclude: str | Sequence[str] = (),
        only_trainable: bool | str | Sequence[str] = False,
        frozen_from: str | os.PathLike[str] | None = None,
        **objects: Any,
    ) -> None:
        self._objects: dict[str, Any] = {}
        self._declared: dict[str, frozenset[Path]] = {}
        self.save_counter = 0
        for name, obj in objects.items():
            self._add(name, obj)
        self._exclude = _texts("exclude", exclude)
        self._only_trainable = (
            only_trainable if isinstance(only_trainable, bool) else _texts("only_trainable", only_trainable)
        )
        if not isinstance(self._only_trainable, bool):
            self._check_modules(self._only_trainable)
        if frozen_from is not None and not self._only_trainable:
            raise ValueError("frozen_from says where what only_trainable leaves out comes from: give that too")
        self._frozen_from = None if frozen_from is None else os.fspath(frozen_from)
        self._trained: frozenset[str] = frozenset()
        self._base: object = None
        self._of_base: frozenset[str] = frozenset()

    @property
    def exclude(self) -> tuple[str, ...]:
        """What the keys begin with that are left out."""
        return self._exclude

    @property
    def only_trainable(self) -> bool | tuple[str, ...]:
        """Whether parameters that are not trained are left out: of all modules, or of those with these names."""
        return self._only_trainable

    @property
    def frozen_from(self) -> str | None:
        """The path of the checkpoint that parameters that are left out come from."""
        return self._frozen_from

    @property
    def objects(self) -> dict[str, Any]:
        """The named objects, in the order in which they were given."""
        return dict(self._objects)

    def replace(self, name: str, value: Any) -> None:
        """Put another object under a name that the checkpoint holds already."""
        if name not in self._objects:
            raise KeyError(name)
        self._objects[name] = value

    def __getattr__(self, name: str) -> Any:
        objects = self.__dict__.get("_objects", {})
        if name in objects:
            return objects[name]
        raise AttributeError(f"the checkpoint holds no object named {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == SAVE_COUNTER:
            object.__setattr__(self, name, value)
        elif name in self._objects:
            self.replace(name, value)
        else:
            self._add(name, value)

    def _add(self, name: str, obj: Any) -> None:
        if not names.is_name(name) or "." in name or name.startswith("_") or name == SAVE_COUNTER:
            raise ValueError(f"{name!r} cannot name an object of a checkpoint")
        if hasattr(type(self), name):
            raise ValueError(
                f"{name!r} cannot name an object of a checkpoint: the checkpoint has a method of that name"
            )
        self._objects[name] = obj
        self._declared[name] = _leaves_of(wrapped_in(obj))

    def _check_modules(self, titles: tuple[str, ...]) -> None:
        for title in titles:
            if not isinstance(wrapped_in(self._objects.get(title)), torch.nn.Module):
                raise ValueError(  # noqa: TRY004 - the name is wrong, whatever is there
                    f"only_trainable={title!r} names no module among the objects of the checkpoint"
                )

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}={type(value).__name__}" for name, value in self._objects.items())
        return f"{type(self).__name__}({kinds})"


def _texts(name: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} takes texts that keys begin with, not {text!r}")
    return tuple(dict.fromkeys(texts))


def _leaves_of(tree: Any) -> frozenset[Path]:
    if is_stateful(tree):
        return frozenset()
    try:
        return frozenset(leaf.path for leaf in flatten(tree, is_array))
    except EncodeError:
        return frozenset()  # the first save refuses it and says why


def declared_in(checkpoint: NamedObjects, name: str) -> frozenset[Path]:
    """Where in a tree of plain values there were leaves when it was given; nothing for other objects."""
    return checkpoint._declared[name]


def trained_in(checkpoint: NamedObjects) -> frozenset[str]:
    """Keys of parameters, and of their state, that were trained or restored at some time and are saved from then on."""
    return checkpoint._trained


def note_trained(checkpoint: NamedObjects, keys: Iterable[str]) -> None:
    """These keys of parameters are trained, or were, or restored: no base need have what they hold now."""
    more = frozenset(keys)
    if not more <= checkpoint._trained:
        checkpoint._trained |= more


def kept_base(checkpoint: NamedObjects) -> object:
    """What ``keep_base`` was given; None before."""
    return checkpoint._base


def keep_base(checkpoint: NamedObjects, base: object) -> None:
    """Have the objects remember what ``frozen_from`` is, which stays what it was when it was first looked at."""
    checkpoint._base = base


def of_base(checkpoint: NamedObjects) -> frozenset[str]:
    """The keys that were filled from ``frozen_from``."""
    return checkpoint._of_base


def note_of_base(checkpoint: NamedObjects, keys: Iterable[str]) -> None:
    """These keys have been filled from ``frozen_from``."""
    checkpoint._of_base |= frozenset(keys)
