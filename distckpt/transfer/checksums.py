"""The checksum of what a store returns."""

from __future__ import annotations

import contextlib

import crc32c

from distckpt.storage.interface import Store

PIECE_BYTES = 8 << 20


def stored_size_and_crc(store: Store, path: str) -> tuple[int, int]:
    """The size in bytes and the CRC32C of an object, every byte of it read. StorageError if it cannot be."""
    with contextlib.closing(store.open(path)) as source:
        scratch = memoryview(bytearray(min(PIECE_BYTES, source.size)))
        crc, position = 0, 0
        while position < source.size:
            piece = scratch[: source.size - position]
            source.read_into(position, piece)
            crc = crc32c.crc32c(piece, crc)
            position += piece.nbytes
        return source.size, crc
