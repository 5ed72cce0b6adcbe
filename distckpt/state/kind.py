"""What a kind of object has to say: what it holds when it is saved, and how it takes that back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from distckpt.format.tree.tree import Path
from distckpt.state.match import Match, Saved
from distckpt.state.named_modules import NamedModules

Sign = tuple[Any, Any]
"""A name, and the tensor or other object that goes by it: of an object its identity counts, of a tensor its memory too."""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the saved tree: how to read it, and which signs tell whether it must be read again.

    ``witness`` must see everything that decides which tensors are read and under which keys. None means: read it at
    every save. ``led`` names the leaves, by the first step of their path in the
    section, of which the lowest rank's are everyone's, whole, where ranks differ. ``packs`` says that a large dict of
    plain values may be one leaf.
    """

    prefix: Path
    read: Callable[[], Any]
    witness: Callable[[], Iterable[Sign]] | None = None
    led: Callable[[], Iterable[str]] = field(default=tuple)
    packs: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is in a checkpoint, what is there now, and how another one is put there."""

    prefix: Path
    get: Callable[[], Any]
    replace: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a kind may have to know beside its object: which rank this is, and the modules that are saved too."""

    rank: int
    world_size: int
    modules: NamedModules


class Kind(Protocol):
    """One object of one kind, in both directions."""

    def sections(self) -> Sequence[Section]:
        """What it holds. EncodeError, naming the key, for what could not be taken back."""

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The keys that belong to a parameter, its own or that of all its state, and the parameter."""

    def match(self, match: Match, saved: Saved) -> None:
        """Tell ``match`` what of ``saved`` it takes, into which memory, and what is to be done with the rest."""

    def put(self, tree: Any) -> None:
        """Take what its sections read, all of it."""
