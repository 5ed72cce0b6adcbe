"""Writing safetensors, in one file or several, with the index that Hugging Face's libraries read and its checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.export.weights import files_of, index_of
from distckpt.foreign.safetensors_file import DTYPES, LENGTH_BYTES, METADATA
from distckpt.foreign.streaming import Streamed
from distckpt.foreign.writing import Order, Sums, Written, put, with_sums
from distckpt.format import names
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.storage import Store

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(order: Order, store: Store) -> list[Written]:
    """See Write. The index is written last, for one file too: it has the CRC32C of every file and tensor."""
    check(order)
    by_name = {tensor.name: tensor for tensor in order.tensors}
    sizes = {name: tensor.nbytes for name, tensor in by_name.items()}
    files = files_of(sizes, order.max_bytes)
    sums = Sums()
    written = [_write(store, file, [by_name[name] for name in tensors], order, sums) for file, tensors in files.items()]
    text = with_sums(index_of(files, sizes), written, sums.of(order.tensors), order.about)
    return [*written, put(store, names.WEIGHTS_INDEX, len(text), [text], order, sums.seen)]


def check(order: Order) -> None:
    """ValueError, naming keys, for what no safetensors file holds."""
    if order.values:
        raise ValueError(
            f"safetensors files hold tensors alone, and these are plain values: {', '.join(list(order.values)[:8])}. Leave them "
            "out by --leave-out KEY, choose a part without any by --select, or write --format torch"
        )
    for tensor in order.tensors:
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{tensor.key}: safetensors files have no elements of {tensor.dtype}. Leave it out by --leave-out KEY, or write "
                "--format torch"
            )
        if tensor.name == METADATA:
            raise ValueError(f"{tensor.key}: no tensor of a safetensors file can have that name")


def _write(store: Store, file: str, tensors: Sequence[Streamed], order: Order, sums: Sums) -> Written:
    # The largest elements first: then every tensor begins at a multiple of its element's size.
    placed = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])
    header = _header(placed, {"format": "pt", **order.about})
    size = len(header) + sum(tensor.nbytes for tensor in placed)
    return put(store, file, size, [header, *placed], order, sums.seen)


def _header(tensors: Sequence[Streamed], metadata: Mapping[str, str]) -> bytes:
    said: dict[str, Any] = {METADATA: dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        said[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
