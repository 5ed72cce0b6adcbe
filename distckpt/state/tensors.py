"""Bytes of a checkpoint into tensors: straight into their memory where layout and dtype allow, else through a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distckpt.errors import DamagedError
from distckpt.format.arrow.index import Index
from distckpt.format.names import shard_name
from distckpt.format.tree.values import decode_value
from distckpt.sharding.chunks import Piece, dtype_from_name, pieces
from distckpt.sharding.match import Transfers, Wanted, match
from distckpt.storage import Store
from distckpt.transfer.checksums import PIECE_BYTES
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats, ShardName, check_transfers, read_transfers

LARGE_VALUE = 16 << 20
"""One that is larger is looked at before there is memory for it."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where the bytes are that an index speaks of: ``folder`` of ``store``, of what people call ``path``."""

    store: Store
    folder: str
    path: str
    name: ShardName = shard_name

    def shard_path(self, rank: int, shard: int) -> str:
        """A shard, relative to the root of the store."""
        return f"{self.folder}/{self.name(rank, shard)}" if self.folder else self.name(rank, shard)


def read_tensors(
    shelf: Shelf, index: Index, targets: Mapping[str, Sequence[torch.Tensor]], progress: Progress | None = None
) -> ReadStats:
    """Fill every target with its part of the saved tensor of that key; all bytes checked before the return.

    Targets have the saved global shape; a DTensor takes what this rank holds of it. Another dtype is converted as
    ``copy_`` does, another device is copied to. DamagedError names shard and key; the targets then hold anything.
    """
    parts = ((key, piece) for key, tensors in targets.items() for piece in _distinct(tensors))
    return read_pieces(shelf, index, parts, progress)


def read_pieces(
    shelf: Shelf, index: Index, parts: Iterable[tuple[str, Piece]], progress: Progress | None = None
) -> ReadStats:
    """As ``read_tensors``, into the memory of parts of the saved tensors, each with the key of its tensor."""
    wanted: list[Wanted] = []
    memory: list[memoryview] = []
    finish: list[Callable[[], object]] = []
    for key, piece in parts:
        dtype = dtype_from_name(index.layout(key)[0])
        landing = piece.local if _is_plain(piece.local, dtype) else torch.empty(piece.length, dtype=dtype, device="cpu")
        if landing is not piece.local:
            finish.append(lambda piece=piece, landing=landing: piece.local.copy_(landing))  # type: ignore[misc]
        wanted.append(Wanted(key, piece.offset, piece.length))
        memory.append(_bytes_of(landing))
    stats = read_rectangles(shelf, index, wanted, memory, progress)
    for step in finish:
        step()
    return stats


def check_tensors(
    shelf: Shelf, index: Index, targets: Mapping[str, Sequence[torch.Tensor]], progress: Progress | None = None
) -> ReadStats:
    """Read and check the bytes that ``read_tensors`` would read, and put them nowhere. DamagedError names shard and key."""
    wanted = (
        Wanted(key, piece.offset, piece.length) for key, tensors in targets.items() for piece in _distinct(tensors)
    )
    transfers = _transfers(shelf, index, list(dict.fromkeys(wanted)))
    return check_transfers(shelf.store, shelf.folder, index, transfers, progress, shelf.name)


def read_values(shelf: Shelf, index: Index, keys: Iterable[str]) -> dict[str, Any]:
    """The plain values of these keys. DamagedError names shard and key."""
    wanted = [Wanted(key, (), ()) for key in keys]
    for one in wanted:
        if index.info(one.key).nbytes > LARGE_VALUE:
            _check_text(shelf, index, one.key)
    memory = [memoryview(bytearray(index.info(one.key).nbytes)) for one in wanted]
    read_rectangles(shelf, index, wanted, memory)
    return {one.key: decode_value(data, shelf.path, one.key) for one, data in zip(wanted, memory, strict=True)}


def _check_text(shelf: Shelf, index: Index, key: str) -> None:
    """No value is made room for that has a zero byte, which JSON never has, and a hole in a file is full of."""
    for row in index.rows(key).tolist():
        rank, shard, position, size = (
            int(column[row]) for column in (index.rank, index.shard, index.position, index.size)
        )
        path = shelf.shard_path(rank, shard)
        scratch = memoryview(bytearray(min(size, PIECE_BYTES)))
        with contextlib.closing(shelf.store.open(path)) as source:
            for done in range(0, size, PIECE_BYTES):
                piece = scratch[: size - done]
                source.read_into(position + done, piece)
                if not np.frombuffer(piece, dtype=np.uint8).all():
                    raise DamagedError(f"{shelf.store.url}/{path}", "not a value: it holds zero bytes", key)


def read_rectangles(
    shelf: Shelf,
    index: Index,
    wanted: Sequence[Wanted],
    memory: Sequence[memoryview],
    progress: Progress | None = None,
) -> ReadStats:
    """Fill each memory, as many bytes as it takes, with its rectangle. DamagedError names shard and key."""
    transfers = _transfers(shelf, index, wanted)
    return read_transfers(shelf.store, shelf.folder, index, transfers, memory, progress=progress, name=shelf.name)


def _transfers(shelf: Shelf, index: Index, wanted: Sequence[Wanted]) -> Transfers:
    transfers = match(index, wanted)
    if transfers.uncovered:
        key = transfers.keys[transfers.uncovered[0]]
        raise DamagedError(shelf.path, "the index does not cover the whole of it", key)
    return transfers


def _distinct(tensors: Sequence[torch.Tensor]) -> Iterable[Piece]:
    for tensor in tensors:
        yield from pieces(tensor)


def _is_plain(local: torch.Tensor, dtype: torch.dtype) -> bool:
    return local.device.type == "cpu" and local.dtype == dtype and local.is_contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    # Bytes rather than elements: NumPy knows neither bfloat16 nor float8.
    flat = (
        tensor.detach().reshape(-1).view(torch.uint8)
        if tensor.numel()
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    array: Any = flat.numpy()
    return memoryview(array)
