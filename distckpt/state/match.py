"""How live objects and a saved checkpoint fit together: found out before anything is changed, then carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from distckpt.errors import DamagedError, MismatchError
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.tree.tree import (
    ArrayStep,
    DictStep,
    KeyStep,
    Leaf,
    Path,
    RankStep,
    Step,
    TypedStep,
    key_of,
    unflatten,
)
from distckpt.sharding.chunks import dtype_from_name, global_shape, local_tensor
from distckpt.state.memory import Stretch, Stretches, is_freed, is_same_bits, storage_of, stretch_of, writable
from distckpt.state.pouring import Poured
from distckpt.state.stored import Stored
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats

Values = Mapping[str, Any]
"""Plain values that have been read, by key."""

Make = Callable[[Values], Any]
"""Makes what was saved below one place, once everything has been read."""

Like = Callable[[str, tuple[int, ...]], torch.Tensor | None]
"""For a key and the saved shape: a tensor whose layout and device the one that is read shall have, or None."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint has below one place: of each key its path, and in ``origins`` its key in the checkpoint.

    Keys and paths are those of the objects, which a restore may have renamed.
    """

    stored: Stored
    prefix: Path
    paths: Mapping[str, Path]
    origins: Mapping[str, str]

    def __contains__(self, key: str) -> bool:
        return key in self.paths

    def __bool__(self) -> bool:
        return bool(self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""
        return self.stored.world_size

    @property
    def is_all(self) -> bool:
        """Whether nothing of the checkpoint was left out, and nothing renamed."""
        return len(self.origins) == len(self.stored.texts) and all(key == name for key, name in self.origins.items())

    def inside(self, key: str) -> Path:
        """The path of a key from this place on."""
        return self.paths[key][len(self.prefix) :]

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype name and global shape; "json" for a plain value."""
        return self.stored.layout(self.origins[key])

    def is_value(self, key: str) -> bool:
        """Whether it is a plain value, not a tensor."""
        return self.layout(key)[0] == VALUE

    def below(self, *steps: Step) -> Saved:
        """What there is below a place inside this one."""
        prefix = (*self.prefix, *steps)
        depth = len(prefix)
        return Saved(
            self.stored,
            prefix,
            {key: path for key, path in self.paths.items() if path[:depth] == prefix},
            self.origins,
        )

    def nothing(self, step: Step) -> Saved:
        """What there is below a step that nothing is below."""
        return Saved(self.stored, (*self.prefix, step), {}, self.origins)

    def without(self, steps: Collection[Step]) -> Saved:
        """All but what is below these steps from this place on."""
        depth = len(self.prefix)
        kept = {key: path for key, path in self.paths.items() if len(path) <= depth or path[depth] not in steps}
        return Saved(self.stored, self.prefix, kept, self.origins)

    def by_step(self) -> dict[Step, Saved]:
        """What there is below each step from this place on, every key looked at once."""
        depth = len(self.prefix)
        parts: dict[Step, dict[str, Path]] = {}
        for key, path in self.paths.items():
            if len(path) > depth:
                parts.setdefault(path[depth], {})[key] = path
        return {step: Saved(self.stored, (*self.prefix, step), paths, self.origins) for step, paths in parts.items()}

    def of_ranks(self) -> dict[int, Saved]:
        """What there is of each rank's own state, by rank."""
        return {step.rank: part for step, part in self.by_step().items() if isinstance(step, RankStep)}


def _everything(key: str) -> bool:
    return True


@dataclass(slots=True)
class Match:
    """What one restore is about to do, and what does not fit. Nothing is changed before ``read`` and ``finish``.

    ``missing`` are keys of the objects that the checkpoint lacks, ``misfits`` says of keys why they do not fit,
    ``claimed`` are the keys that some object of this rank has a place for, and ``partial`` says that not all need fit.
    ``asks`` tells which keys of the objects are to be restored at all, ``asks_all`` whether all that is at and below one
    is. ``poured`` is what went into which container.
    """

    stored: Stored
    partial: bool = False
    asks: Callable[[str], bool] = _everything
    asks_all: Callable[[str], bool] = _everything
    claimed: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    poured: Poured = field(default_factory=dict)
    _tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _stretches: dict[Stretch, tuple[str, torch.Tensor]] = field(default_factory=dict)
    _storages: dict[int, Stretches] = field(default_factory=dict)
    _is_aside: bool = False
    _values: dict[str, str] = field(default_factory=dict)
    _checks: list[Callable[[Values], None]] = field(default_factory=list)
    _steps: list[Callable[[Values], None]] = field(default_factory=list)

    # ---- what the kinds of object say ----------------------------------------------------------------------------

    def lacks(self, keys: Iterable[str]) -> None:
        """The checkpoint does not have these keys of an object, which stay as they are."""
        self.missing.extend(key for key in keys if self.asks(key))

    def claim(self, keys: Iterable[str]) -> None:
        """An object has a place for these keys."""
        self.claimed.update(keys)

    def disclaim(self, keys: Iterable[str]) -> None:
        """The object that had a place for these keys did not take them."""
        self.claimed.difference_update(keys)

    def misfit(self, key: str, reason: str) -> None:
        """A key does not fit, and what it was for stays as it is."""
        self.claimed.add(key)
        self.misfits[key] = reason

    def fill(self, saved: Saved, key: str, array: torch.Tensor | np.ndarray[Any, Any]) -> bool:
        """Have the saved tensor read straight into live memory; False, with a misfit, if it has another shape."""
        if isinstance(array, torch.Tensor) and is_lazy(array):
            self.misfit(key, "the parameter has no shape yet: run the model on an input once before it is restored")
            return False
        if not writable(array):
            self.misfit(key, "it cannot be filled in place: it is read-only, or some of its elements share memory")
            return False
        live = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
        if live.is_meta:
            self.misfit(key, "the tensor is on the meta device: give the model memory first, by to_empty(device=...)")
            return False
        try:
            freed = is_freed(local_tensor(live))
        except ValueError as error:
            self.misfit(key, str(error))
            return False
        if freed:
            self.misfit(key, "the tensor's memory has been freed (resize_(0) of its storage): give it memory first")
            return False
        if saved.is_value(key) or saved.layout(key)[1] != global_shape(live):
            found = "a plain value" if saved.is_value(key) else f"{list(saved.layout(key)[1])}"
            self.misfit(key, f"saved {found}, here {list(global_shape(live))}")
            return False
        self.claimed.add(key)
        self._read_into(saved.origins[key], live)
        return True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, nothing is read into live memory before all of it has been read: an older checkpoint may leave alone
        what is here, and it must not have been touched then. It costs new memory, and a copy."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    def is_taken(self, array: torch.Tensor | np.ndarray[Any, Any]) -> bool:
        """Whether something is to be read into some of its memory already."""
        return storage_of(array) in self._storages

    def value(self, saved: Saved, key: str) -> None:
        """Have a plain value read."""
        self.claimed.add(key)
        self._values[key] = saved.origins[key]

    def tree(self, saved: Saved, live: Mapping[str, Any], like: Like, kept: Iterable[tuple[Path, Any]] = ()) -> Make:
        """Have everything below one place read, into new memory but for the keys that ``live`` has arrays for.

        The arrays of ``live`` are leaves of what is made, and so are the ``kept`` ones, which were not saved. One whose
        memory is filled under another key already stays only if the same was saved under both. Raised before
        anything is changed: DamagedError if the paths make no tree, MismatchError if those of a selection make none.
        """
        others = list(kept)
        made: dict[str, Any] = {}
        apart: dict[str, torch.Tensor] = {}
        for key in saved:
            if saved.is_value(key):
                self.value(saved, key)
            elif key in live and self.is_taken(live[key]) and saved.layout(key)[1] == tuple(live[key].shape):
                self.claimed.add(key)
                apart[key] = self._new(saved, key, like)
                made[key] = live[key]
            elif key in live:
                self.fill(saved, key, live[key])
                made[key] = live[key]
            else:
                self.claimed.add(key)
                made[key] = self._new(saved, key, like)

        def make(values: Values) -> Any:
            held = {**made, **{key: _live_or(made[key], new) for key, new in apart.items()}}
            leaves = [_leaf(saved.inside(key), held[key] if key in held else values[key]) for key in saved]
            try:
                return unflatten(_together(leaves, others))
            except ValueError as error:
                if saved.is_all:
                    raise DamagedError(self.stored.path, f"the paths of its keys make no tree: {error}") from error
                reason = f"what was selected or renamed makes no tree here: {error}"
                raise MismatchError(self.stored.path, (), (), {key_of(saved.prefix): reason}) from error

        self.check(make)  # so that holes are found before anything is changed
        return make

    def check(self, look: Callable[[Values], None]) -> None:
        """Have a look at the values, once they have been read and before anything is changed."""
        self._checks.append(look)

    def afterwards(self, step: Callable[[Values], None]) -> None:
        """Do this when everything has been read."""
        self._steps.append(step)

    def unasked(self, leaves: Iterable[Leaf], saved: Saved) -> list[Leaf]:
        """Those of an object's leaves that are not to be restored and can stay beside what was saved."""
        rest = [leaf for leaf in leaves if leaf.key not in saved and not self.asks(leaf.key)]
        if not rest:
            return []
        depth, kinds = len(saved.prefix), dict[Path, Any]()
        for key, path in saved.paths.items():
            kinds[path] = _VALUE if saved.is_value(key) else None
            for at in range(depth, len(path)):
                kinds.setdefault(path[:at], _kind_of(path[at]))
        return [leaf for leaf in rest if _has_room(leaf.path, depth, kinds)]

    # ---- what comes of it ----------------------------------------------------------------------------------------

    def look(self) -> Values:
        """Read the plain values, and see whether they fit. Nothing is changed. DamagedError names shard and key."""
        found = self.stored.values(sorted(set(self._values.values())))
        values = {key: found[origin] for key, origin in self._values.items()}
        for check in self._checks:
            check(values)
        return values

    def check_bytes(self, progress: Progress | None) -> None:
        """Read and check what ``read`` would read; nothing is changed. DamagedError names shard and key."""
        self.stored.check(self._tensors, progress)

    def read(self, progress: Progress | None) -> ReadStats:
        """Read every tensor. DamagedError names shard and key; those that are read in their places then hold anything."""
        with torch.no_grad():
            return self.stored.read(self._tensors, progress)

    def finish(self, values: Values) -> None:
        """Do all that is to be done once everything has been read."""
        with torch.no_grad():
            for step in self._steps:
                step(values)

    def _read_into(self, origin: str, live: torch.Tensor) -> None:
        # Tied tensors that were saved with different content: the later one counts, as in load_state_dict. All are read
        # at once, so one that shares only a part of its memory with an earlier one is copied there afterwards.
        stretch = stretch_of(live)
        before = self._stretches.get(stretch)
        others = self._storages.setdefault(storage_of(live), Stretches()) if live.numel() else Stretches()
        if before is not None:
            self._tensors[before[0]] = [other for other in self._tensors[before[0]] if other is not before[1]]
        else:
            others.add(stretch)
        target = self._aside(live) if self._is_aside or others.overlap else live
        self._stretches[stretch] = (origin, target)
        self._tensors.setdefault(origin, []).append(target)

    def _aside(self, live: torch.Tensor) -> torch.Tensor:
        """New memory like that of ``live``, which gets what was read there afterwards."""
        aside = torch.empty_like(live, requires_grad=False)

        def copy(values: Values) -> None:
            live.copy_(aside)

        self.afterwards(copy)
        return aside

    def _new(self, saved: Saved, key: str, like: Like) -> torch.Tensor:
        dtype, shape = saved.layout(key)
        model = like(key, shape)
        if model is not None and global_shape(model) == shape:
            new = torch.empty_like(model, dtype=dtype_from_name(dtype), requires_grad=False)
        else:
            new = torch.empty(shape, dtype=dtype_from_name(dtype), device="cpu" if model is None else model.device)
        self._tensors.setdefault(saved.origins[key], []).append(new)
        return new


def _kind_of(step: Step) -> Any:
    """What kind of container the step goes into."""
    if isinstance(step, TypedStep):
        return step.kind, _kind_of(step.step)
    return DictStep if isinstance(step, KeyStep) else type(step)


def _has_room(path: Path, depth: int, kinds: Mapping[Path, Any]) -> bool:
    """Whether nothing else is where the path goes through, or what may be an empty dict; ``kinds`` has the containers that
    are there, None for tensors."""
    for at in range(depth, len(path)):
        if path[:at] not in kinds or kinds[path[:at]] is _VALUE:
            return True
        if kinds[path[:at]] != _kind_of(path[at]):
            return False
    return path not in kinds


_VALUE = object()
"""In place of a kind of container: a plain value."""


def _together(leaves: list[tuple[Path, Any]], others: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """What was saved, and what stays beside it: in a dict that was empty then, but not in another value's place."""
    inside = {path[:at] for path, _ in others for at in range(len(path))}
    whole = {path: type(value) is dict and not value for path, value in leaves if path in inside}
    if not whole:
        return [*leaves, *others]
    kept = [(path, value) for path, value in others if all(whole.get(path[:at], True) for at in range(len(path)))]
    inside = {path[:at] for path, _ in kept for at in range(len(path))}
    return [*((path, value) for path, value in leaves if path not in inside), *kept]


def nothing_like(key: str, shape: Sequence[int]) -> None:
    """For ``Match.tree``: plain tensors on the CPU."""


def _live_or(live: Any, new: torch.Tensor) -> Any:
    """The live array if it holds what was read into ``new``, which has its dtype then; else that."""
    held = torch.from_numpy(live) if isinstance(live, np.ndarray) else live
    new = new.to(held.dtype)
    return live if is_same_bits(local_tensor(held), local_tensor(new)) else new


def _leaf(path: Path, value: Any) -> tuple[Path, Any]:
    """A live array is one already; what was read for one is a tensor yet."""
    is_live = isinstance(value, np.ndarray) and path[-1:] == (ArrayStep(),)
    return (path[:-1] if is_live else path), value
