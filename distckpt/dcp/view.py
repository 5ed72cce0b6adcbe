"""A checkpoint of ours as DCP's planners see one: flat keys, each a tensor in chunks or bytes.

DCP flattens a state dict by rules of its own, and asks a checkpoint for the keys that come of it. Ours are the leaves of the
saved tree by our rules, which enter less: a list of parameter groups, say, is one value. So the tree is made, with
placeholders for tensors, and flattened as DCP would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.errors import DamagedError, MismatchError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.tree.path import ArrayStep, KeyStep, Path, RankStep, Step, TypedStep, decode_path
from distckpt.format.tree.tree import unflatten
from distckpt.state.optimizer import GROUPS, WHO
from distckpt.state.stored import Stored, load_leaves

Place = tuple[str | int, ...]
"""Where DCP sees a leaf: the keys and list indices that lead to it. Its flat key is these, joined by dots."""


class Placeholder:
    """Stands for a tensor that is not read yet."""

    __slots__ = ()

    def numpy(self) -> PlaceholderArray:
        """As a tensor has it, where a NumPy array was saved."""
        return PlaceholderArray()


class PlaceholderArray:
    """Stands for a NumPy array, which DCP takes for bytes as it does all that is no tensor."""

    __slots__ = ()


TENSOR = Placeholder()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor, under ``key`` in the checkpoint."""

    key: str


@dataclass(frozen=True, slots=True)
class Object:
    """Anything else: ``value`` if it is known already, else what the arrays of these ``keys`` and the rest make."""

    value: Any
    depth: int
    keys: tuple[str, ...] = ()


Seen = Tensor | Object


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What is ``stored``: ``items`` by DCP's flat key, ``places`` say where they are in the state dict.

    ``unsaved`` are the keys of what DCP's groups of an optimizer say and a manager's do not: who is in a group, which is
    the program's business. ``paths`` and ``values`` are by our keys.
    """

    stored: Stored
    items: dict[str, Seen]
    places: dict[str, Place]
    unsaved: frozenset[str]
    paths: dict[str, Path]
    values: dict[str, Any]

    def made(self, objects: Iterable[Object]) -> list[Any]:
        """The objects, for which the arrays in them are read. DamagedError names shard and key."""
        wanted = list(objects)
        keys = {key for one in wanted for key in one.keys if key not in self.values}
        leaves = {**self.values, **load_leaves(self.stored, sorted(keys))} if keys else self.values
        return [self._made(one, leaves) for one in wanted]

    def _made(self, one: Object, leaves: Mapping[str, Any]) -> Any:
        if not one.keys:
            return one.value
        parts = [(self.paths[key][one.depth :], leaves[key]) for key in one.keys]
        return parts[0][1] if not parts[0][0] else unflatten(parts)


def view_of(stored: Stored) -> View:
    """Read the plain values, and see all of it as DCP does. DamagedError for what is not as it was written."""
    paths = {key: decode_path(text, stored.path) for key, text in stored.texts.items()}
    values = stored.values([key for key in paths if stored.layout(key)[0] == VALUE])
    try:
        tree = unflatten((path, values.get(key, TENSOR)) for key, path in paths.items())
    except ValueError as error:
        raise DamagedError(stored.path, f"its keys do not make a tree: {error}") from error
    mapped = _mapped(paths)
    below = _by_place(mapped)
    items: dict[str, Seen] = {}
    places: dict[str, Place] = {}
    for place, value in leaves_of(tree):
        flat = ".".join(map(str, place))
        if flat in items:
            raise MismatchError(stored.path, (), (), {flat: "two places of the checkpoint have this name in DCP"})
        places[flat] = place
        items[flat] = _seen(place, value, below, values)
    unsaved = {".".join(map(str, (*place, name))) for place in _groups(tree) for name in WHO}
    return View(stored, items, places, frozenset(unsaved - items.keys()), paths, values)


def leaves_of(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """What DCP makes of a state dict: mappings are entered, and lists in which there is a tensor or a mapping somewhere."""
    if not is_entered(tree):
        yield place, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves_of(item, (*place, str(key)))
    else:
        for at, item in enumerate(tree):
            yield from leaves_of(item, (*place, at))


def is_entered(value: Any) -> bool:
    """Whether DCP takes a value of a state dict apart."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and any(_is_tensor(item) or is_entered(item) for item in value)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor | Placeholder)


def _seen(place: Place, value: Any, below: Mapping[Place, Sequence[str]], values: Mapping[str, Any]) -> Seen:
    keys = tuple(below.get(place, ()))
    if isinstance(value, Placeholder):
        return Tensor(keys[0])
    return Object(value, len(place), keys if any(key not in values for key in keys) else ())


def _mapped(paths: Mapping[str, Path]) -> dict[str, Place]:
    """Where DCP sees each leaf. State of single ranks is a list of those that have some."""
    ranks: dict[Path, set[int]] = {}
    for path in paths.values():
        for at, step in enumerate(path):
            if isinstance(step, RankStep):
                ranks.setdefault(path[:at], set()).add(step.rank)
    order = {above: sorted(found) for above, found in ranks.items()}
    return {
        key: tuple(
            order[path[:at]].index(step.rank) if isinstance(step, RankStep) else _element(step)
            for at, step in enumerate(path)
            if not isinstance(step, ArrayStep)
        )
        for key, path in paths.items()
    }


def _element(step: Step) -> str | int:
    inner = step.step if isinstance(step, TypedStep) else step
    if isinstance(inner, KeyStep):
        return str(inner.key)
    index = getattr(inner, "index", None)
    return int(index) if index is not None else str(inner)


def _by_place(mapped: Mapping[str, Place]) -> dict[Place, list[str]]:
    """The keys at and below every place."""
    below: dict[Place, list[str]] = {}
    for key, place in mapped.items():
        for depth in range(len(place) + 1):
            below.setdefault(place[:depth], []).append(key)
    return below


def _groups(tree: Any, place: Place = ()) -> Iterator[Place]:
    """Where the parameter groups of optimizers are."""
    if isinstance(tree, Mapping):
        groups = tree.get(GROUPS)
        if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
            yield from ((*place, GROUPS, at) for at in range(len(groups)))
        for key, item in tree.items():
            yield from _groups(item, (*place, str(key)))
