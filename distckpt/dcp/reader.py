"""Reader: what torch.distributed.checkpoint loads from, of any of our checkpoints."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from distckpt.dcp.view import Object, Tensor, View, view_of
from distckpt.directory.locate import locate, read_index
from distckpt.errors import RestoreError
from distckpt.format.arrow.index import Index
from distckpt.format.tree.many import ATOMS
from distckpt.sharding.chunks import Piece, dtype_from_name
from distckpt.state.stored import Committed
from distckpt.storage import placed


class Reader(StorageReader):
    """Reads a checkpoint into a state dict: ``dcp.load(state_dict, storage_reader=Reader(path))``.

    ``path`` is what ``distckpt.open`` takes: ``<directory>/ckpt-42``, a directory (its newest), or a lone copy, whether a
    ``Writer``, a ``CheckpointManager`` or a ``Checkpoint`` has saved it, on any number of ranks; ``storage_options``,
    ``cache_dir``, ``data`` and ``data_options`` as there. A ``checkpoint_id`` that ``dcp.load`` is given is another path.

    Each rank reads what DCP's planner wants of it, and every byte is checked before it counts. Keys are what DCP makes of
    the nested state; ``params`` of an optimizer's groups, which a manager does not save, stay as the state dict has them.
    State of single ranks comes as a list. What is no tensor was saved as typed values, and is put where torch's planner
    would put it, but under a number where the state dict has that as key, as an optimizer's own does, and torch would put
    it beside that under a text; a planner with a ``load_bytes`` of its own gets plain values as bytes that are made in memory.

    What is wrong comes as CheckpointException on every rank, with our own errors in its ``failures``: those of
    ``distckpt.open``, DamagedError naming shard and key; and DCP's own for missing keys and sizes that differ. Tensors hold
    anything then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        data: str | os.PathLike[str] | None = None,
        data_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._path = path
        self._options = placed(storage_options, cache_dir=cache_dir, data=data, data_options=data_options)
        self._view: View | None = None
        self._stored: Committed | None = None
        self._problem: Exception | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path or URL may be one."""
        return bool(os.fspath(checkpoint_id))

    # ---- what DCP calls, in this order ---------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another load begins, of another path if one is given."""
        self._view = self._stored = None
        if checkpoint_id is not None:
            self._path = checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is, by DCP's keys. What keeps it from being read is raised by the next call, for DCP drops it here."""
        self._view = self._stored = self._problem = None
        try:
            where = locate(self._path, self._options)
            self._stored = stored = Committed(where, read_index(where))
            self._view = view = view_of(stored)
        except Exception as error:  # noqa: BLE001 - it is kept
            self._problem = error
            return Metadata({})
        return Metadata(
            _Known(view, stored.index),
            planner_data=dict(view.places),
            storage_meta=StorageMeta(checkpoint_id=stored.path),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises what was wrong with the checkpoint."""
        if self._problem is not None:
            raise self._problem

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, with what this rank reads it from."""
        where = self._opened[1].where
        return dataclasses.replace(plan, storage_data=(where.path, where.manifest.attempt))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The same plans. RestoreError if ranks found different checkpoints."""
        found = {plan.storage_data: rank for rank, plan in enumerate(plans)}
        if len(found) > 1:
            told = ", ".join(f"rank {rank} found {path} ({attempt})" for (path, attempt), rank in found.items())
            raise RestoreError(
                f"the ranks do not read the same checkpoint: {told}. Nothing was read. If one was committed meanwhile, load "
                "again, or give the path of one checkpoint rather than that of the directory"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all that the plan wants. DamagedError names shard and key."""
        view, stored = self._opened
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        self._read_objects(view, [item for item in plan.items if item.type != LoadItemType.TENSOR], planner)
        self._read_tensors(view, stored, [item for item in tensors if 0 not in item.lengths], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # ---- how it is read ------------------------------------------------------------------------------------------

    @property
    def _opened(self) -> tuple[View, Committed]:
        if self._view is None or self._stored is None:
            raise RestoreError(f"{os.fspath(self._path)}: its metadata were not read: let dcp.load call this")
        return self._view, self._stored

    def _read_tensors(self, view: View, stored: Committed, wanted: Sequence[ReadItem], planner: LoadPlanner) -> None:
        targets = [planner.resolve_tensor(item).detach() for item in wanted]
        parts = []
        for item, target in zip(wanted, targets, strict=True):
            if target.shape != item.lengths:
                raise RestoreError(
                    f"{item.dest_index.fqn}: the planner wants a part of shape {list(item.lengths)} and has memory of shape "
                    f"{list(target.shape)} for it"
                )
            seen = view.items[item.storage_index.fqn]
            assert isinstance(seen, Tensor)
            begin = item.storage_index.offset or (0,) * len(item.lengths)
            offset = tuple(first + more for first, more in zip(begin, item.storage_offsets, strict=True))
            parts.append((seen.key, Piece(offset, tuple(item.lengths), target)))
        stored.read_pieces(parts)
        for item, target in zip(wanted, targets, strict=True):
            planner.commit_tensor(item, target)

    def _read_objects(self, view: View, wanted: Sequence[ReadItem], planner: LoadPlanner) -> None:
        seen = [(item, view.items.get(item.storage_index.fqn)) for item in wanted]  # none of what is not saved
        found = [(item, one) for item, one in seen if isinstance(one, Object)]
        places = _Places()
        for (item, _), value in zip(found, view.made(one for _, one in found), strict=True):
            _hand_over(planner, item, value, places)


class _Known(dict[str, STORAGE_TYPES]):
    """What DCP's planners are told of every key. Who asks hears too of what is not saved and stays as it is."""

    def __init__(self, view: View, index: Index) -> None:
        super().__init__({flat: _told(index, item) for flat, item in view.items.items()})
        self._unsaved = view.unsaved

    def __contains__(self, flat: object) -> bool:
        return super().__contains__(flat) or flat in self._unsaved

    def __missing__(self, flat: str) -> BytesStorageMetadata:
        if flat not in self._unsaved:
            raise KeyError(flat)
        return BytesStorageMetadata()


def _told(index: Index, item: Tensor | Object) -> TensorStorageMetadata | BytesStorageMetadata:
    """An item as DCP's metadata have it."""
    if not isinstance(item, Tensor):
        return BytesStorageMetadata()
    dtype, shape = index.layout(item.key)
    rows, ndim = index.rows(item.key), len(shape)
    chunks = [
        ChunkStorageMetadata(torch.Size(offset[:ndim]), torch.Size(length[:ndim]))
        for offset, length in zip(index.offset[rows].tolist(), index.length[rows].tolist(), strict=True)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype_from_name(dtype)), torch.Size(shape), chunks)


def _hand_over(planner: LoadPlanner, item: ReadItem, value: Any, places: _Places) -> None:
    """Put a value where torch's planner would put it, or give another one the bytes that it asks for."""
    key = item.dest_index.fqn
    if not isinstance(planner, DefaultLoadPlanner) or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes:
        planner.load_bytes(item, _bytes(value, key))
    elif planner.flatten_state_dict:
        places.put(planner.original_state_dict, planner.mappings[key], value)
    else:
        planner.state_dict[key] = value


class _Places:
    """Where in the state dict of one load the values belong, which DCP knows by texts and list indices alone."""

    def __init__(self) -> None:
        self._keys: dict[int, dict[str, Any]] = {}

    def put(self, root: Any, place: Sequence[str | int], value: Any) -> None:
        """Put it there, through containers that are made where there are none, as torch makes them."""
        for step, following in itertools.pairwise(place):
            key = self._key(root, step)
            made: Any = {} if isinstance(following, str) else []
            if isinstance(root, MutableMapping):
                root = root.setdefault(key, made)
            else:
                if root[key] is None:
                    root[key] = made
                root = root[key]
        root[self._key(root, place[-1])] = value

    def _key(self, container: Any, step: str | int) -> Any:
        """What ``step`` is called in the container: a key that is no text goes by its text, if no other key does. A list
        is as long as it takes afterwards."""
        if isinstance(container, list) and isinstance(step, int):
            container.extend([None] * (step + 1 - len(container)))
        if not isinstance(container, MutableMapping) or step in container:
            return step
        if id(container) not in self._keys:  # once each: an optimizer may number thousands of parameters
            self._keys[id(container)] = _by_text(container)
        return self._keys[id(container)].get(str(step), step)


def _by_text(keys: Iterable[Any]) -> dict[str, Any]:
    """The keys by their texts, but for those that share one."""
    counts = Counter(map(str, keys))
    return {str(key): key for key in keys if counts[str(key)] == 1}


def _bytes(value: Any, key: str) -> io.BytesIO:
    """What planners load by ``torch.load``. It never was on storage, and has nothing in it that would run code."""
    if not _is_plain(value):
        raise RestoreError(
            f"{key}: a {type(value).__name__}, which this planner would unpickle. torch's DefaultLoadPlanner takes it as it is"
        )
    made = io.BytesIO()
    torch.save(value, made)
    made.seek(0)
    return made


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return type(value) in (*ATOMS, torch.Tensor) or (type(value) is np.ndarray and not value.dtype.hasobject)
