"""What a checkpoint's tensors are, in one text: the same for a copy, another one for other bits."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.arrow.index import Index


def digest_of(index: Index) -> str:
    """The SHA-256, in hex digits, of all tensors of a checkpoint: key, dtype, shape, and of every chunk where it belongs and
    the CRC32C of its bytes.

    Plain values are not in it, nor where the bytes lie. The same tensors in other chunks, as another number of ranks
    writes them, have another one.
    """
    tensors = [number for number, dtype in enumerate(index.dtypes) if dtype != VALUE]
    tensors.sort(key=lambda number: index.names[number])
    turn = np.full(len(index.names), -1, dtype="<i8")
    turn[tensors] = np.arange(len(tensors))
    rows = np.flatnonzero(turn[index.key] >= 0)
    rows = rows[np.lexsort((*index.offset[rows].T[::-1], turn[index.key[rows]]))]
    found = hashlib.sha256()
    for number in tensors:
        found.update(json.dumps([index.names[number], *index.layout(index.names[number])]).encode())
    for column in (turn[index.key[rows]], index.offset[rows], index.length[rows]):
        found.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    found.update(np.ascontiguousarray(index.blocks[index.starts[rows + 1] - 1], dtype="<u4").tobytes())
    return found.hexdigest()
