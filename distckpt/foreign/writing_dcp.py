"""Writing folders of torch.distributed.checkpoint, as its own writer does: what pickles there are, torch makes."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import crc32c
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from distckpt.dcp.view import Object, View, view_of
from distckpt.foreign.writing import Order, Sums, Written, put
from distckpt.format.arrow.dtypes import ITEM_SIZES, VALUE
from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.path import DictStep, encode_path
from distckpt.sharding.chunks import dtype_from_name
from distckpt.sharding.match import Wanted
from distckpt.state.stored import Targets
from distckpt.storage import Store, join
from distckpt.storage.oserrors import writing
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats

PART_BYTES = 256 << 20
"""Of a part of a tensor, which is in memory as a whole while it is written."""

WRITERS, LEAST_BYTES = 2, 64 << 20
"""A file is written by one thread, at half the pace of a copy: so many are written at a time, if they are worth it."""

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
    items = list(_items(view, min(PART_BYTES, order.max_bytes)))
    planner = _Planner(view, order, max((nbytes for nbytes, _ in items), default=0))
    writer = _Writer(store.url, overwrite=False)
    each = max(LEAST_BYTES, -(-sum(nbytes for nbytes, _ in items) // WRITERS))
    shares = list(_shares(items, min(order.max_bytes, each)))
    plans, metadata = planner.create_global_plan([SavePlan(items, planner_data=dict(view.places)) for items in shares])
    with writing(store.url):
        writer.set_up_storage_writer(True)
        writer.prepare_local_plan(plans[0])
    plans = writer.prepare_global_plan(plans)
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="distckpt-export") as pool:
        results = list(pool.map(lambda plan: writer.write_data(plan, planner).wait(), plans))
    with writing(join(store.url, ".metadata")):
        writer.finish(metadata, results)
    written = sorted(writer.written, key=lambda file: file.name)
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


class _Writer(filesystem.FileSystemWriter):
    """DCP's own, but one that has a single part of each file in memory, where DCP's keeps all of the file.

    ``written`` are its files, with the CRC32C of what went out.
    """

    def __init__(self, path: str, overwrite: bool) -> None:
        super().__init__(path, overwrite=overwrite)
        self.written: list[Written] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter."""
        name = f"{plan.storage_data.prefix}0{filesystem.DEFAULT_SUFFIX}"
        path, results = self.fs.concat_path(self.path, name), []
        with writing(str(path)), self.fs.create_stream(path, "wb") as stream:
            file: Any = _Summed(stream)
            for item in plan.items:
                begin, data = file.size, planner.resolve_data(item)
                if isinstance(data, torch.Tensor):
                    _save(data, file)
                else:
                    file.write(data.getbuffer())
                place = filesystem._StorageInfo(name, begin, file.size - begin)
                results.append(WriteResult(item.index, file.size - begin, place))
            stream.flush()
            os.fsync(stream.fileno())
        self.written.append(Written(name, file.size, file.crc32c))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Summed:
    """A file to be written from its beginning to its end, and the CRC32C of that. What failed it is its ``failure``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = 0
        self.crc32c = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """As a file's."""
        view = memoryview(data).cast("B")
        self.crc32c = crc32c.crc32c(view, self.crc32c)
        self.size += view.nbytes
        try:
            self._stream.write(view)
        except OSError as error:
            self.failure = error
            raise
        return view.nbytes

    def flush(self) -> None:
        """As a file's."""


def _save(tensor: torch.Tensor, file: Any) -> None:
    """As torch.save, which makes a RuntimeError of what fails a file, and says nothing of it."""
    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        raise file.failure or error from None


class _Planner(DefaultSavePlanner):
    """Hands over what is stored, read when it is asked for. A thread's next part takes the place of its last one."""

    def __init__(self, view: View, order: Order, largest: int) -> None:
        super().__init__()
        self._view = view
        self._meter = order.meter
        self._largest = largest
        self._own = threading.local()

    def resolve_data(self, write_item: WriteItem) -> Any:
        """See SavePlanner."""
        seen, data = self._view.items[write_item.index.fqn], write_item.tensor_data
        if isinstance(seen, Object):
            return self.transform_object(write_item, self._view.made([seen])[0])
        assert data is not None
        dtype, sizes = data.properties.dtype, data.chunk.sizes
        if not sizes.numel():
            return torch.empty(sizes, dtype=dtype)
        memory = self._memory()[: sizes.numel() * dtype.itemsize]
        wanted = Wanted(seen.key, tuple(data.chunk.offsets), tuple(sizes))
        self._view.stored.fill([wanted], [memory])
        self._meter.add(memory.nbytes)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(sizes)

    def _memory(self) -> memoryview:
        """This thread's, in which the largest part has room."""
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(bytearray(self._largest))
        memory: memoryview = self._own.memory
        return memory


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
