"""What every format that is written has in common: an order, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import crc32c

from distckpt.errors import StorageError
from distckpt.foreign.streaming import Part, Seen, Streamed, sections
from distckpt.format.tree.tree import Path
from distckpt.state.stored import Stored
from distckpt.storage import Store, join
from distckpt.transfer.progress import Meter


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be written: of ``stored`` these tensors and plain values, by their names and places in the files.

    ``paths`` says of all names where they are in a tree. ``max_bytes`` is the most of one file, unless a single tensor is
    larger. ``about`` says what it was made of.
    """

    stored: Stored
    tensors: Sequence[Streamed] = field(repr=False)
    values: Mapping[str, Any] = field(repr=False)
    paths: Mapping[str, Path] = field(repr=False)
    max_bytes: int
    about: Mapping[str, str]
    meter: Meter


@dataclass(frozen=True, slots=True)
class Written:
    """A file of ``size`` bytes with that CRC32C."""

    name: str
    size: int
    crc32c: int


Write = Callable[[Order, Store], list[Written]]
"""Writes all files of an order into a new folder. ValueError, before anything is written, for what the format cannot hold."""


def with_sums(
    index: Mapping[str, Any], files: Sequence[Written], tensors: Mapping[str, str], about: Mapping[str, str]
) -> bytes:
    """The text of an index of Hugging Face's form, with the CRC32C of every file and every tensor in its metadata."""
    told = {
        **index["metadata"],
        **about,
        "files": {one.name: {"size": one.size, "crc32c": f"{one.crc32c:08x}"} for one in files},
        "crc32c": dict(tensors),
    }
    return json.dumps({**index, "metadata": told}, indent=2).encode() + b"\n"


def put(store: Store, name: str, size: int, parts: Iterable[Part], order: Order, seen: Seen) -> Written:
    """Write one file of these parts; durable on return, and what the store says that it has is what was sent."""
    crc = 0

    def passing() -> Iterator[memoryview]:
        nonlocal crc
        for section in sections(parts, order.stored, seen):
            crc = crc32c.crc32c(section, crc)
            yield section
            order.meter.add(section.nbytes)

    info = store.put_unique(name, size, passing())
    if info.size != size or info.crc32c not in (None, crc):
        raise StorageError(join(store.url, name), "what the store has is not what was written")
    return Written(name, size, crc)


class Sums:
    """The CRC32C of each tensor, as its bytes go by."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def seen(self, tensor: Streamed, view: memoryview) -> None:
        """More bytes of a tensor."""
        self._found[tensor.name] = crc32c.crc32c(view, self._found.get(tensor.name, 0))

    def of(self, tensors: Iterable[Streamed]) -> dict[str, str]:
        """Eight hex digits for each."""
        return {tensor.name: f"{self._found.get(tensor.name, 0):08x}" for tensor in tensors}
