"""Looking over an Arrow IPC file before Arrow itself opens it.

Arrow would decompress buffers and revive extension types as soon as it reads them, so both are looked for in the
file's own metadata first. Only the few flatbuffer fields that matter are followed, every step bounds-checked.
Field numbers are those of Arrow's File.fbs and Message.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from distckpt.errors import DamagedError

MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_DICTIONARY, _RECORD_BATCH = 2, 3
_BLOCK_BYTES = 24


@dataclass(frozen=True, slots=True)
class _Table:
    """A flatbuffer table at ``at`` of ``data``; every read raises ValueError when it leaves the data."""

    data: bytes
    at: int

    def number(self, kind: str, at: int) -> int:
        size = struct.calcsize(kind)
        if not 0 <= at <= len(self.data) - size:
            raise ValueError("a metadata offset points outside the file")
        value: int = struct.unpack_from(kind, self.data, at)[0]
        return value

    def field(self, number: int) -> int | None:
        """Where the field lies, or None if it is absent."""
        vtable = self.at - self.number("<i", self.at)
        entry = 4 + 2 * number
        if entry + 2 > self.number("<H", vtable):
            return None
        offset = self.number("<H", vtable + entry)
        return self.at + offset if offset else None

    def follow(self, number: int) -> int | None:
        """Where the table or vector lies that the field refers to, or None if it is absent."""
        at = self.field(number)
        return None if at is None else at + self.number("<I", at)

    def blocks(self, number: int) -> Iterator[tuple[int, int, int]]:
        """Offset, metadata length and body length of each block that the field lists."""
        at = self.follow(number)
        for index in range(self.number("<I", at) if at is not None else 0):
            block = (at or 0) + 4 + index * _BLOCK_BYTES
            yield self.number("<q", block), self.number("<i", block + 8), self.number("<q", block + 16)


def check_plain(data: bytes, path: str, dictionaries: int, batches: int) -> None:
    """Refuse all but an uncompressed Arrow file without extension types, of that many dictionaries and batches.

    DamagedError otherwise. Its arrays are still to be validated once Arrow has read them.
    """
    try:
        _check(data, dictionaries, batches)
    except ValueError as error:
        raise DamagedError(path, str(error)) from error


def _check(data: bytes, dictionaries: int, batches: int) -> None:
    start, end = _footer(data)
    if data.find(b"ARROW:extension", start, end) >= 0:
        raise ValueError("it uses an Arrow extension type")
    footer = _Table(data, start + _Table(data, start).number("<I", start))
    for field, kind, expected in ((2, _DICTIONARY, dictionaries), (3, _RECORD_BATCH, batches)):
        blocks = list(footer.blocks(field))
        if len(blocks) != expected:
            raise ValueError(f"it holds {len(blocks)} batches or dictionaries where {expected} belong")
        for block in blocks:
            _check_message(data, start, kind, *block)


def _footer(data: bytes) -> tuple[int, int]:
    end = len(data) - len(MAGIC) - 4
    if end < 8 or not data.startswith(MAGIC) or not data.endswith(MAGIC):
        raise ValueError("not a whole Arrow file: cut short, or something else")
    start = end - int.from_bytes(data[end : end + 4], "little")
    if start < 8:
        raise ValueError("its footer is longer than the file")
    return start, end


def _check_message(data: bytes, limit: int, kind: int, offset: int, metadata: int, body: int) -> None:
    if not (offset >= 8 and metadata >= 16 and body >= 0 and offset + metadata + body <= limit):
        raise ValueError("a batch lies outside the file")
    head = _Table(data, offset)
    if head.number("<I", offset) != _CONTINUATION:
        raise ValueError("a batch in an outdated layout")
    message = _Table(data, offset + 8 + head.number("<I", offset + 8))
    header_type, header = message.field(1), message.follow(2)
    if header_type is None or header is None or message.number("<B", header_type) != kind:
        raise ValueError("a batch that is not of the kind that the footer says")
    if message.field(4) is not None:
        # Where the first Arrow versions said that buffers are compressed; today's still listens to it.
        raise ValueError("a batch with metadata of its own, which is never written here")
    batch = _Table(data, header)
    if kind == _DICTIONARY:
        inner = batch.follow(1)
        if inner is None:
            raise ValueError("a dictionary without values")
        batch = _Table(data, inner)
    if batch.field(3) is not None:
        raise ValueError("its buffers are compressed, which is never written here and may hide any amount of data")
