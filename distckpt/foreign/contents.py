"""What files of other programs hold: tensors by the place of their bytes, plain values, and what could not be read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distckpt.errors import DamagedError, EncodeError
from distckpt.foreign.files import File
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.format.limits import MAX_DIMENSIONS
from distckpt.format.tree.tree import DictStep, Path, flatten, key_of


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor whose elements lie in a file from byte ``position`` on.

    They lie in row-major order, unless ``strides``, in elements, say how far apart.
    """

    file: File
    position: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Its own size; what it lies in may be larger."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def span(self) -> int:
        """Elements from its first to its last in the file."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape)
        return sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True)) + 1

    @property
    def parts(self) -> tuple[tuple[tuple[int, ...], Held], ...]:
        """Itself, as Spread has it."""
        return (((0,) * len(self.shape), self),)


@dataclass(frozen=True, slots=True)
class Spread:
    """A tensor that lies in several places of one store: each of ``parts`` is a rectangle of it, from that offset on.

    Together they must cover it, each element once; they lie in row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Held], ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def strides(self) -> None:
        """None: see Held."""
        return


@dataclass(frozen=True, slots=True)
class Contents:
    """All that files hold. ``kind`` says in words what they are.

    ``paths`` has every key in order; each is among ``tensors`` or ``values``. ``refused`` says of keys why they could not
    be read, and ``notes`` tell what else people should know. ``number`` is that of the step, if the files say it.
    """

    kind: str
    path: str
    paths: Mapping[str, Path] = field(repr=False)
    tensors: Mapping[str, Held | Spread] = field(repr=False)
    values: Mapping[str, Any] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    number: int | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(held.nbytes for held in self.tensors.values())


def contents_of(
    kind: str,
    path: str,
    tree: Mapping[str, Any],
    refused: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    number: int | None = None,
) -> Contents:
    """The contents that a tree of plain containers, with Held and Spread for tensors, stands for. EncodeError for what is no
    tree."""
    leaves = flatten(dict(tree), lambda value: type(value) in (Held, Spread)) if tree else []
    return Contents(
        kind,
        path,
        {leaf.key: leaf.path for leaf in leaves},
        {leaf.key: leaf.value for leaf in leaves if type(leaf.value) in (Held, Spread)},
        {leaf.key: leaf.value for leaf in leaves if type(leaf.value) not in (Held, Spread)},
        dict(refused or {}),
        tuple(notes),
        number,
    )


def beside(contents: Contents, others: Sequence[Contents]) -> Contents:
    """The same contents, and with them all keys of the others, which must be others."""
    every = (contents, *others)
    return replace(
        contents,
        paths={key: path for one in every for key, path in one.paths.items()},
        tensors={key: held for one in every for key, held in one.tensors.items()},
        values={key: value for one in every for key, value in one.values.items()},
        refused={key: why for one in every for key, why in one.refused.items()},
    )


def below(contents: Contents, own: str, name: str) -> Contents:
    """The same contents with every key below ``name``: instead of below ``own``, if all of them are there."""
    is_own = all(path[0] == DictStep(own) for path in contents.paths.values())
    is_own = is_own and all(key == own or key.startswith(f"{own}.") for key in contents.refused)
    moved = {key: (DictStep(name), *path[is_own:]) for key, path in contents.paths.items()}
    return replace(
        contents,
        paths={key_of(path): path for path in moved.values()},
        tensors={key_of(moved[key]): held for key, held in contents.tensors.items()},
        values={key_of(moved[key]): value for key, value in contents.values.items()},
        refused={f"{name}{key[len(own) :] if is_own else f'.{key}'}": why for key, why in contents.refused.items()},
    )


def why_not_encoded(error: EncodeError) -> str:
    """The reason alone of an error that speaks of a save, for those who tell of no save."""
    return str(error).removeprefix(str(EncodeError(error.key, "")))


def check_shape(where: str, key: str, shape: Iterable[object]) -> tuple[int, ...]:
    """The shape that a file says. DamagedError if no tensor has it."""
    sizes = tuple(shape)
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 60 for size in sizes):
        raise DamagedError(where, "no tensor has such a shape", key)
    return sizes  # type: ignore[return-value]  # all of them are int by now
