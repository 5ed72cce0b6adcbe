"""What differs between two checkpoints, as far as their indexes tell: by the CRCs of what was written. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distckpt.format.arrow.index import Index

Verdict = Literal["same", "differs", "unknown"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Element type ("json": a value) and shape of a key on both sides."""

    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The keys that only one has, those of another shape or type, and of the others which are ``same`` and which differ.

    ``unknown`` are cut into chunks along which no CRC of the one can be compared with those of the other.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: dict[str, Layout]
    same: tuple[str, ...]
    differing: tuple[str, ...]
    unknown: tuple[str, ...]


def compare(one: Index, other: Index) -> Comparison:
    """What changed from ``one`` to ``other``. Nothing is read: equal CRC32Cs of chunks of equal size are equal bytes."""
    both = [key for key in one.names if key in other]
    changed = {key: Layout(*_sides(one, other, key)) for key in both if one.layout(key) != other.layout(key)}
    verdicts = {key: _verdict(one, other, key) for key in both if key not in changed}
    return Comparison(
        removed=tuple(key for key in one.names if key not in other),
        added=tuple(key for key in other.names if key not in one),
        changed=changed,
        same=_with(verdicts, "same"),
        differing=_with(verdicts, "differs"),
        unknown=_with(verdicts, "unknown"),
    )


def _with(verdicts: dict[str, Verdict], wanted: Verdict) -> tuple[str, ...]:
    return tuple(key for key, verdict in verdicts.items() if verdict == wanted)


def _sides(one: Index, other: Index, key: str) -> tuple[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]]:
    (dtype, shape), (other_dtype, other_shape) = one.layout(key), other.layout(key)
    return (dtype, other_dtype), (shape, other_shape)


def _verdict(one: Index, other: Index, key: str) -> Verdict:
    """By chunks that are the same part of the tensor on both sides. One of them that differs is enough; so is all being so."""
    mine, theirs = _chunks(one, key), _chunks(other, key)
    common = mine.keys() & theirs.keys()
    if any(mine[box] != theirs[box] for box in common):
        return "differs"
    if mine.keys() == theirs.keys():
        return "same"
    whole, whole_of_other = _whole(one, key), _whole(other, key)
    if whole is None or whole_of_other is None:
        return "unknown"
    return "same" if whole == whole_of_other else "differs"


def _chunks(index: Index, key: str) -> dict[tuple[int, ...], tuple[int, int]]:
    """Size and CRC32C by where the chunk is."""
    rows, ndim = index.rows(key), int(index.ndims[index.ids[key]])
    boxes = np.concatenate([index.offset[rows, :ndim], index.length[rows, :ndim]], axis=1).tolist()
    crcs = index.blocks[index.starts[rows + 1] - 1].tolist()
    return {tuple(box): (size, crc) for box, size, crc in zip(boxes, index.size[rows].tolist(), crcs, strict=True)}


def _whole(index: Index, key: str) -> tuple[int, int] | None:
    """Size and CRC32C of the whole tensor, of chunks that follow each other in memory; None if they do not."""
    rows = index.rows(key)
    number = index.ids[key]
    if not np.array_equal(
        index.length[rows, 1:], np.broadcast_to(index.shapes[number, 1:], index.length[rows, 1:].shape)
    ):
        return None
    rows = rows[np.argsort(index.offset[rows, 0], kind="stable")]
    size, crc = 0, 0
    crcs = index.blocks[index.starts[rows + 1] - 1].tolist()
    for nbytes, own in zip(index.size[rows].tolist(), crcs, strict=True):
        size, crc = size + nbytes, joined(crc, own, nbytes)
    return size, crc


# ---- CRC32C of bytes that follow each other -------------------------------------------------------------------------

_POLYNOMIAL = 0x82F63B78


def joined(first: int, second: int, nbytes: int) -> int:
    """The CRC32C of some bytes and ``nbytes`` more, from those of both: the first one shifted over as many zeros.

    Shifting is linear, so a matrix over GF(2), squared for each bit of the length; as in zlib's crc32_combine.
    """
    if not nbytes:
        return first
    bit = [_POLYNOMIAL, *(1 << at for at in range(31))]  # by one zero bit
    matrix = _squared(_squared(_squared(bit)))  # by one zero byte
    while nbytes:
        if nbytes & 1:
            first = _times(matrix, first)
        nbytes >>= 1
        if nbytes:
            matrix = _squared(matrix)
    return first ^ second


def _times(matrix: Sequence[int], vector: int) -> int:
    product = 0
    for column in matrix:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


def _squared(matrix: Sequence[int]) -> list[int]:
    return [_times(matrix, column) for column in matrix]
