"""What a rank holds: objects taken apart into rows, tensors and plain values; cheaply when nothing has moved.

Every object yields sections. A section whose tensors are the very memory of the live parameters or optimizer state
is *steady*: as long as its witness sees the same names, and the same objects at the same addresses, it is not walked
again. All others are read again at each save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import crc32c
import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from distckpt.errors import EncodeError
from distckpt.format.json.left_out import Base
from distckpt.format.limits import MAX_DIMENSIONS
from distckpt.format.tree.many import ATOMS
from distckpt.format.tree.tree import ArrayStep, DictStep, Leaf, Path, encode_path, flatten, key_of
from distckpt.format.tree.values import encode_value
from distckpt.sharding.chunks import dtype_name, global_shape, local_tensor, pieces
from distckpt.sharding.description import Description, Row, build_description
from distckpt.sharding.omission import Omission
from distckpt.state.base import base_of
from distckpt.state.kind import Kind, Section, Sign
from distckpt.state.kinds import kinds_of, makeup_of, surroundings_of
from distckpt.state.leaving import (
    Leaving,
    check_no_holes,
    check_something_is_trained,
    flags_of,
    frozen_parameters,
    leaving_of,
)
from distckpt.state.memory import is_freed, writable
from distckpt.state.named_modules import NamedModules
from distckpt.state.objects import SAVE_COUNTER, NamedObjects, PerRank, is_array, note_trained, of_base, wrapped_in
from distckpt.state.unchanged import Snapshot, snapshot_of

LARGE_TEXT = 64 << 10
"""So long a plain value is not encoded again as long as it is made of the same things."""

MOST_ITEMS = 1000
"""A dict of more plain values is one, where no other rank may have other items of it: each leaf costs some 20 us a save."""

Memory = tuple[int, torch.Size, tuple[int, ...], torch.dtype, bool, bool]
"""Address, shape, strides and dtype of what this rank holds of a tensor, and whether it is to be conjugated, or negated."""

Seen = tuple[tuple[Any, ...], ...]
"""What a witness has seen: names, identities, and memory where it was a tensor."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank holds at one moment. For each row either a source tensor or a value's bytes; the other is None.

    ``copies`` says of each row whether it is of a tensor that other ranks may hold too, in a copy that must be equal;
    empty if there are no others. ``omission`` is what the rank leaves out; None if it holds all there is.
    """

    rows: list[Row]
    sources: list[torch.Tensor | None]
    values: list[bytes | None]
    copies: list[bool]
    description: Description
    omission: Omission | None = None

    def describe(self, *, compare: bool) -> bytes:
        """The description with the CRCs of the values as they are now; with ``compare`` also those of the tensors that
        other ranks may hold too, every byte of which is read for that."""
        rows = self.rows
        if compare and any(self.copies):
            parts = zip(rows, self.sources, self.copies, strict=True)
            rows = [
                replace(row, crc=_crc(source)) if copy and source is not None else row for row, source, copy in parts
            ]
        return build_description(rows, self.omission).encode()


@dataclass(frozen=True, slots=True)
class _Taken:
    """A tensor leaf as it was last taken apart: the tensor itself, its memory then, its rows and their sources."""

    path: Path
    array: torch.Tensor
    memory: Memory
    parts: tuple[tuple[Row, torch.Tensor], ...]
    is_copied: bool


@dataclass(frozen=True, slots=True)
class _Text:
    """A plain value as it was last encoded, its row, and what it was made of then: None if it may change in itself."""

    path: Path
    snapshot: Snapshot | None
    data: bytes
    row: Row


@dataclass(frozen=True, slots=True)
class _Read:
    """A section as it was last read; ``seen`` is what its witness saw, () when it is not steady, ``frozen`` and
    ``excluded`` the keys that were left out."""

    rows: list[Row]
    sources: list[torch.Tensor | None]
    values: list[bytes | None]
    copies: list[bool]
    seen: Seen
    kept: tuple[Any, ...]
    taken: dict[str, _Taken | _Text]
    frozen: list[str]
    excluded: list[str]


class Collector:
    """Collects what a rank holds of one checkpoint, again and again.

    With ``compare_always`` every description counts as new, so that copies are compared at each save.
    """

    def __init__(self, checkpoint: NamedObjects, rank: int, world_size: int, compare_always: bool = False) -> None:
        self._checkpoint = checkpoint
        self._rank = rank
        self._world_size = world_size
        self._compare_always = compare_always
        self._collected = 0
        self._last: list[_Read] | None = None
        self._objects: tuple[Any, ...] = ()
        self._modules = NamedModules({})
        self._sections: list[tuple[Section, bool]] = []
        self._holding: Holding | None = None
        self._leaving = Leaving()
        self._matched: set[str] = set()

    def collect(self) -> Holding:
        """What the rank holds now. EncodeError names the key of what cannot be stored without pickle."""
        if self._last is None or self._holding is None or not self._are_the_same_objects():
            return self._collect_afresh()
        with self._modules.at_rest():
            reads = self._read_again(self._last)
        if reads is None:
            return self._collect_afresh()
        return self._joined(reads, self._holding.description, self._holding.omission)

    def _read_again(self, before: list[_Read]) -> list[_Read] | None:
        """What is to be read at every save; None if not all is where it was before."""
        reads = []
        for (section, shared), last in zip(self._sections, before, strict=True):
            if last.seen and section.witness is not None and _identify(section.witness()) == last.seen:
                reads.append(last)
            elif last.seen:
                return None
            else:
                reads.append(self._read(section, shared, last.taken))
        is_same = all(
            _same_rows(new.rows, old.rows) and new.frozen == old.frozen for new, old in zip(reads, before, strict=True)
        )
        return reads if is_same else None

    def _are_the_same_objects(self) -> bool:
        now = _identities(self._checkpoint)
        return len(now) == len(self._objects) and all(
            one is other for one, other in zip(now, self._objects, strict=True)
        )

    def _collect_afresh(self) -> Holding:
        around = surroundings_of(self._checkpoint, self._rank, self._world_size)
        self._modules = around.modules
        with self._modules.at_rest():
            return self._collect_all(kinds_of(self._checkpoint, around))

    def _collect_all(self, kinds: Mapping[str, Kind]) -> Holding:
        self._leaving = leaving = leaving_of(self._checkpoint, kinds)
        check_something_is_trained(self._checkpoint, kinds, leaving)
        note_trained(self._checkpoint, leaving.trained)
        self._objects = _identities(self._checkpoint)
        of_all = {name: not isinstance(obj, PerRank) for name, obj in self._checkpoint.objects.items()}
        kept = {name: kind for name, kind in kinds.items() if not leaving.excludes(name)}
        self._sections = [(section, of_all[name]) for name, kind in kept.items() for section in kind.sections()]
        self._sections.append((Section((DictStep(SAVE_COUNTER),), lambda: self._checkpoint.save_counter), True))
        reads = [self._read(section, shared, {}) for section, shared in self._sections]
        rows = [row for read in reads for row in read.rows]
        _check_distinct(rows)
        omission = self._omission(kinds, reads)
        return self._joined(reads, build_description(rows, omission), omission)

    def _omission(self, kinds: Mapping[str, Kind], reads: list[_Read]) -> Omission | None:
        exclude, only_trainable = self._checkpoint.exclude, self._checkpoint.only_trainable is not False
        if not exclude and not only_trainable:
            return None
        excluded = [*kinds, *(key for read in reads for key in read.excluded)]
        parameters = (key for kind in kinds.values() for key, _ in kind.parameters()) if exclude else ()
        self._matched |= self._leaving.matched(excluded, parameters)
        matched = tuple(text for text in exclude if text in self._matched)
        frozen = tuple(key for read in reads for key in read.frozen)
        return Omission(exclude, matched, only_trainable, frozen, self._base(kinds))

    def _base(self, kinds: Mapping[str, Kind]) -> Base | None:
        """Where frozen parameters come from, if the objects say so. EncodeError if they have not been filled from there."""
        base = base_of(self._checkpoint)
        frozen = frozen_parameters(self._checkpoint, kinds, self._leaving) if base is not None else frozenset()
        if unknown := frozen - of_base(self._checkpoint):
            raise EncodeError(
                min(unknown),
                "it is frozen, and has not been read from frozen_from, so nobody knows whether it is the same: call "
                "restore_or_initialize() before the first save, which reads it",
            )
        return None if base is None else base.name

    def _read(self, section: Section, shared: bool, before: Mapping[str, _Taken | _Text]) -> _Read:
        rows: list[Row] = []
        sources: list[torch.Tensor | None] = []
        values: list[bytes | None] = []
        copies: list[bool] = []
        taken: dict[str, _Taken | _Text] = {}
        led = frozenset(section.led()) if shared else frozenset[str]()
        depth = len(section.prefix)
        leaves, frozen, excluded = _sorted_out(
            flatten(section.read(), is_array, section.prefix, self._most(section, shared)), self._leaving
        )
        for leaf in leaves:
            if is_array(leaf.value):
                if isinstance(leaf.value, np.ndarray):
                    leaf = Leaf((*leaf.path, ArrayStep()), leaf.key, leaf.value)
                is_led = len(leaf.path) > depth and str(leaf.path[depth]) in led and not isinstance(leaf.value, DTensor)
                now = taken[leaf.key] = _take(leaf, before.get(leaf.key), is_led, self._world_size)
                for row, source in now.parts:
                    rows.append(row)
                    sources.append(source)
                    values.append(None)
                    copies.append(now.is_copied and shared and not is_led)
            else:
                text = taken[leaf.key] = _encode(leaf, shared, before.get(leaf.key))
                rows.append(text.row)
                sources.append(None)
                values.append(text.data)
                copies.append(False)
        seen, kept = _steadiness(section, sources, values)
        return _Read(rows, sources, values, copies, seen, kept, taken, frozen, excluded)

    def _most(self, section: Section, shared: bool) -> int | None:
        packs = section.packs and (self._world_size == 1 or not shared)
        return MOST_ITEMS if packs and not self._leaving.cuts(key_of(section.prefix)) else None

    def _joined(self, reads: list[_Read], description: Description, omission: Omission | None) -> Holding:
        self._last = reads
        self._collected += 1
        digest = f"{description.digest.partition('/')[0]}/{self._collected}"
        description = replace(description, digest=digest) if self._compare_always else description
        self._holding = Holding(
            [row for read in reads for row in read.rows],
            [source for read in reads for source in read.sources],
            [value for read in reads for value in read.values],
            [copy for read in reads for copy in read.copies] if self._world_size > 1 else [],
            description,
            omission,
        )
        return self._holding


def _identities(checkpoint: NamedObjects) -> tuple[Any, ...]:
    """The names, and what the objects are made up of as far as it decides into which sections they are taken apart."""
    found: list[Any] = []
    for name, obj in checkpoint.objects.items():
        inner = wrapped_in(obj)
        found += [name, obj if obj is not inner else None, *makeup_of(inner)]
    return (*found, *flags_of(checkpoint))


def as_tensor(array: torch.Tensor | np.ndarray[Any, Any], key: str) -> torch.Tensor:
    """The array as a tensor that shares its memory where it can. EncodeError if torch has no such dtype or layout."""
    if isinstance(array, torch.Tensor):
        _check_dense(array, key)
        if array.is_conj() or array.is_neg():
            array = array.resolve_conj().resolve_neg()
        return array.detach()
    try:
        return torch.from_numpy(array if writable(array) and array.flags.c_contiguous else array.copy())
    except TypeError as error:
        raise EncodeError(key, f"a NumPy array of dtype {array.dtype} has no counterpart in torch: {error}") from error


def _check_dense(tensor: torch.Tensor, key: str) -> None:
    if is_lazy(tensor):
        raise EncodeError(key, "the parameter has no shape yet: run the model on an input once before it is saved")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        advice = "save the tensors that it is made of (indices and values, or offsets and values), or convert it by to_dense()"
        raise EncodeError(key, f"a {kind} tensor has no plain bytes: {advice}")
    if tensor.is_quantized:
        raise EncodeError(
            key, "a quantized tensor has no plain bytes: save its int_repr() and its scale, or dequantize()"
        )


def _sorted_out(leaves: list[Leaf], leaving: Leaving) -> tuple[list[Leaf], list[str], list[str]]:
    """The leaves that are saved, and the keys of those that are not: of parameters that are not trained, and excluded."""
    if not leaving:
        return leaves, [], []
    kept: list[Leaf] = []
    frozen: list[str] = []
    excluded: list[str] = []
    for leaf in leaves:
        if leaving.excludes(leaf.key):
            check_no_holes(leaf, leaving)
            excluded.append(leaf.key)
        elif leaving.leaves_out(leaf.key):
            frozen.append(leaf.key)
        else:
            kept.append(leaf)
    return kept, frozen, excluded


def _encode(leaf: Leaf, shared: bool, before: _Taken | _Text | None) -> _Text:
    """A plain value as text, with its row; what it was before, as far as that is still so."""
    known = before if isinstance(before, _Text) and before.path == leaf.path else None
    if known is not None and known.snapshot is not None and known.snapshot.is_of(leaf.value):
        return known
    data = encode_value(leaf.value, leaf.key)
    path = known.row.path if known is not None else encode_path(leaf.path)
    row = Row(leaf.key, path, "json", (), (), (), 0, crc32c.crc32c(data) if shared else None)
    worthwhile = type(leaf.value) in ATOMS or len(data) >= LARGE_TEXT
    return _Text(leaf.path, snapshot_of(leaf.value) if worthwhile else None, data, row)


def _take(leaf: Leaf, before: _Taken | _Text | None, is_led: bool, world_size: int) -> _Taken:
    """The leaf's rows; those of before if it is the same tensor at the same place, which is much cheaper to see."""
    array = leaf.value
    if (
        isinstance(before, _Taken)
        and before.array is array
        and before.memory == _memory(array)
        and before.path == leaf.path
    ):
        return before
    tensor = as_tensor(array, leaf.key)
    kept = array if isinstance(array, torch.Tensor) and not (array.is_conj() or array.is_neg()) else tensor
    return _Taken(
        leaf.path,
        kept,
        _memory(kept),
        tuple(_tensor_rows(tensor, leaf.path, leaf.key, is_led)),
        _is_copied(tensor, world_size),
    )


def _is_copied(tensor: torch.Tensor, world_size: int) -> bool:
    """Whether other ranks may hold the same part of it: a plain tensor is each rank's whole, by itself, and so is that of a
    mesh which is not all ranks, as there may be another such mesh beside it."""
    if not isinstance(tensor, DTensor):
        return True
    sizes = tensor.device_mesh.shape
    return tensor.device_mesh.size() < world_size or any(
        placement.is_replicate() and sizes[dim] > 1 for dim, placement in enumerate(tensor.placements)
    )


def _crc(source: torch.Tensor) -> int:
    plain = source.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return crc32c.crc32c(memoryview(plain.reshape(-1).view(torch.uint8).numpy())) if plain.numel() else 0  # type: ignore[arg-type]


def _memory(tensor: torch.Tensor) -> Memory:
    # Once a save for every tensor: the attribute is fifty times cheaper than to_local, which it stands for here.
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    dtype = local.dtype
    return local.data_ptr(), local.shape, local.stride(), dtype, dtype.is_complex and local.is_conj(), local.is_neg()


def _tensor_rows(tensor: torch.Tensor, path: Path, key: str, is_led: bool) -> Iterable[tuple[Row, torch.Tensor]]:
    try:
        name, shape, held = dtype_name(tensor.dtype), global_shape(tensor), pieces(tensor)
        if len(shape) > MAX_DIMENSIONS:
            raise EncodeError(
                key, f"the tensor has {len(shape)} dimensions, and {MAX_DIMENSIONS} is the most that can be stored"
            )
    except ValueError as error:
        raise EncodeError(key, str(error)) from error
    text = encode_path(path)
    if any(is_freed(piece.local) for piece in held):
        raise EncodeError(
            key, "the memory of the tensor has been freed (resize_(0) of its storage): save it before that"
        )
    for piece in held:
        yield Row(key, text, name, shape, piece.offset, piece.length, piece.local.nbytes, None, is_led), piece.local


def _steadiness(
    section: Section, sources: Sequence[torch.Tensor | None], values: Sequence[bytes | None]
) -> tuple[Seen, tuple[Any, ...]]:
    """What the witness sees, and the objects themselves so that no identity is used twice; empty if unsteady.

    Steady means that every source lies in the witness's own memory. What is handed out as a copy makes it unsteady.
    """
    if section.witness is None or any(value is not None for value in values):
        return (), ()
    signs = tuple(section.witness())
    kept = tuple(thing for _, thing in signs)
    try:
        memory = {local_tensor(thing).untyped_storage().data_ptr() for thing in kept if isinstance(thing, torch.Tensor)}
    except ValueError:
        return (), ()  # one is conjugated or negated by a mark, say, and what is saved of it is a copy
    for source in sources:
        if source is not None and source.numel() and source.untyped_storage().data_ptr() not in memory:
            return (), ()
    return _identify(signs), kept


def _identify(signs: Iterable[Sign]) -> Seen:
    """What tells whether a section must be read again. One loop, as it runs over every tensor at every save."""
    seen: list[Any] = []
    add, tensor, sharded = seen.append, torch.Tensor, DTensor
    for name, thing in signs:
        if not isinstance(thing, tensor):
            add((name, id(thing)))
            continue
        local = thing._local_tensor if isinstance(thing, sharded) else thing
        dtype = local.dtype
        conj = dtype.is_complex and local.is_conj()
        add((name, id(thing), local.data_ptr(), local.shape, local.stride(), dtype, conj, local.is_neg()))
    return tuple(seen)


def _same_rows(new: Sequence[Row], old: Sequence[Row]) -> bool:
    if new is old:
        return True
    return len(new) == len(old) and all(_shape_of(one) == _shape_of(other) for one, other in zip(new, old, strict=True))


def _shape_of(row: Row) -> tuple[Any, ...]:
    return (row.key, row.path, row.dtype, row.shape, row.offset, row.length)


def _check_distinct(rows: Sequence[Row]) -> None:
    paths: dict[str, str] = {}
    for row in rows:
        if paths.setdefault(row.key, row.path) != row.path:
            raise EncodeError(row.key, "two different places of the saved tree have this key; rename one of them")
