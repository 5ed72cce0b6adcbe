"""Writing folders of torch.distributed.checkpoint, by its own writer: what pickles there are, it makes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from distckpt.dcp.view import Object, View, view_of
from distckpt.foreign.writing import Order, Sums, Written, put
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE
from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.path import DictStep, encode_path
from distckpt.sharding.chunks import dtype_from_name
from distckpt.sharding.match import Wanted
from distckpt.state.stored import Targets
from distckpt.storage import Store
from distckpt.transfer.checksums import stored_size_and_crc
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats

PART_BYTES = 256 << 20
"""Of a part of a tensor, which is in memory as a whole while DCP writes it."""


WRITERS, LEAST_BYTES = 2, 64 << 20
"""DCP writes a file by one thread, at half the pace of a copy: so many are written at a time, if they are worth it."""

SUMS = "checksums.json"
"""Has the CRC32C of each file, which DCP itself neither writes nor looks at."""


def write_dcp(order: Order, store: Store) -> list[Written]:
    """See Write. Each file is that of a rank, as if so many had saved it; it comes back on any number of ranks.

    Only to a local folder, as there is a ``.metadata``, which no store of ours would name.
    """
    if "://" in store.url:
        raise ValueError(
            "files of torch.distributed.checkpoint are made in a local folder: give one, and copy it from there"
        )
    view = view_of(_Chosen(order))
    planner = _Planner(view, order)
    writer = filesystem.FileSystemWriter(store.url, overwrite=False)
    items = list(_items(view, min(PART_BYTES, order.max_bytes)))
    each = max(LEAST_BYTES, -(-sum(nbytes for nbytes, _ in items) // WRITERS))
    shares = list(_shares(items, min(order.max_bytes, each)))
    plans, metadata = planner.create_global_plan([SavePlan(items, planner_data=dict(view.places)) for items in shares])
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(plans[0])
    plans = writer.prepare_global_plan(plans)
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="distckpt-export") as pool:
        results = list(pool.map(lambda plan: writer.write_data(plan, planner).wait(), plans))
    writer.finish(metadata, results)
    files = [f"__{rank}_0.distcp" for rank in range(len(shares))]
    written = [Written(name, *stored_size_and_crc(store, name)) for name in files]
    sums = {file.name: {"size": file.size, "crc32c": f"{file.crc32c:08x}"} for file in written}
    text = json.dumps({"files": sums, **order.about}, indent=2).encode() + b"\n"
    return [*written, put(store, SUMS, len(text), [text], order, Sums().seen)]


class _Chosen:
    """What was chosen to be exported, as all that is stored, at its places below what was selected."""

    def __init__(self, order: Order) -> None:
        self._stored = order.stored
        self._values = order.values
        self._keys = {tensor.name: tensor.key for tensor in order.tensors}
        self._texts = {name: encode_path(path or (DictStep(name),)) for name, path in order.paths.items()}

    @property
    def path(self) -> str:
        return self._stored.path

    @property
    def world_size(self) -> int:
        return self._stored.world_size

    @property
    def left_out(self) -> LeftOut | None:
        return self._stored.left_out

    @property
    def texts(self) -> Mapping[str, str]:
        return self._texts

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        return self._stored.layout(self._keys[key]) if key in self._keys else (VALUE, ())

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        return {key: self._values[key] for key in keys}

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        return self._stored.read({self._keys[key]: tensors for key, tensors in targets.items()}, progress)

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        return self._stored.check({self._keys[key]: tensors for key, tensors in targets.items()}, progress)

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        self._stored.fill([replace(one, key=self._keys[one.key]) for one in wanted], memory)


class _Planner(DefaultSavePlanner):
    """Hands over what is stored, read when DCP asks for it."""

    def __init__(self, view: View, order: Order) -> None:
        super().__init__()
        self._view = view
        self._meter = order.meter

    def resolve_data(self, write_item: WriteItem) -> Any:
        """See SavePlanner."""
        seen, data = self._view.items[write_item.index.fqn], write_item.tensor_data
        if isinstance(seen, Object):
            return self.transform_object(write_item, self._view.made([seen])[0])
        assert data is not None
        part = torch.empty(data.chunk.sizes, dtype=data.properties.dtype, device="cpu")
        if part.numel():
            wanted = Wanted(seen.key, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            memory: Any = part.reshape(-1).view(torch.uint8).numpy()
            self._view.stored.fill([wanted], [memoryview(memory)])
            self._meter.add(memory.nbytes)
        return part


def _items(view: View, most: int) -> Iterator[tuple[int, WriteItem]]:
    """What DCP is to write, each with its size: tensors in parts of up to ``most`` bytes, cut along the first dimension."""
    for flat, seen in view.items.items():
        if isinstance(seen, Object):
            yield 0, WriteItem(MetadataIndex(flat), WriteItemType.BYTE_IO)
            continue
        dtype, shape = view.stored.layout(seen.key)
        row = math.prod(shape[1:]) * ITEM_SIZES[dtype]
        rows = shape[0] if shape else 1
        at_once = max(1, most // max(1, row))
        for first in range(0, max(1, rows), at_once):
            count = min(at_once, rows - first)
            offsets = torch.Size((first, *(0,) * (len(shape) - 1)) if shape else ())
            chunk = ChunkStorageMetadata(offsets, torch.Size((count, *shape[1:]) if shape else ()))
            data = TensorWriteData(chunk, TensorProperties(dtype=dtype_from_name(dtype)), torch.Size(shape))
            yield count * row, WriteItem(MetadataIndex(flat, offsets), WriteItemType.SHARD, tensor_data=data)


def _shares(items: Iterable[tuple[int, WriteItem]], most: int) -> Iterator[list[WriteItem]]:
    """Items in order, in groups of up to ``most`` bytes; one at least."""
    share: list[WriteItem] = []
    total = 0
    for nbytes, item in items:
        if share and total + nbytes > most:
            yield share
            share, total = [], 0
        share.append(item)
        total += nbytes
    yield share
