"""A zip archive as ``torch.save`` makes it, written from front to back: nothing is compressed, tensors begin at 64 bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distckpt.foreign.streaming import Part, Streamed

_ALIGNMENT = 64
_PADDING = 0x4246
"""The id of the extra field that torch pads with."""

_DEFERRED = 0x0808
"""The CRC comes after the bytes; names are UTF-8."""

_LARGE = 0xFFFFFFFF
_VERSION = 45
_DATE = (1 << 5) | 1
"""1 January 1980: the same content makes the same file."""


@dataclass(slots=True)
class Record:
    """A file of the archive, at ``offset``; its ``crc`` is known when its bytes have gone by."""

    name: str
    content: bytes | Streamed
    offset: int = 0
    crc: int = 0

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes

    def header(self) -> bytes:
        """What stands before its bytes."""
        name = self.name.encode()
        sizes = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        padding = -(self.offset + 30 + len(name) + len(sizes) + 4) % _ALIGNMENT
        extra = sizes + struct.pack("<HH", _PADDING, padding) + bytes(padding)
        fixed = (b"PK\x03\x04", _VERSION, _DEFERRED, 0, 0, _DATE, 0, _LARGE, _LARGE, len(name), len(extra))
        return struct.pack("<4sHHHHHIIIHH", *fixed) + name + extra

    def trailer(self) -> bytes:
        """What stands after them."""
        return struct.pack("<4sIQQ", b"PK\x07\x08", self.crc, self.size, self.size)

    def entry(self) -> bytes:
        """What the table at the end says of it."""
        name = self.name.encode()
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.offset)
        fixed = (b"PK\x01\x02", _VERSION, _VERSION, _DEFERRED, 0, 0, _DATE, self.crc, _LARGE, _LARGE)
        return (
            struct.pack("<4sHHHHHHIII", *fixed)
            + struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, _LARGE)
            + name
            + extra
        )


@dataclass(slots=True)
class Archive:
    """An archive of these records, in this order."""

    records: Sequence[Record]
    size: int = 0
    _table_at: int = 0
    _of: dict[int, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        position = 0
        for record in self.records:
            record.offset = position
            position += len(record.header()) + record.size + len(record.trailer())
            if isinstance(record.content, Streamed):
                self._of[id(record.content)] = record
            else:
                record.crc = zlib.crc32(record.content)
        self._table_at = position
        self.size = position + len(self._table())

    def parts(self) -> Iterator[Part]:
        """Its bytes, those after a tensor once the tensor has been seen."""
        for record in self.records:
            yield record.header()
            yield record.content
            yield record.trailer
        yield self._table

    def seen(self, tensor: Streamed, view: memoryview) -> None:
        """More bytes of a tensor have gone by."""
        record = self._of[id(tensor)]
        record.crc = zlib.crc32(view, record.crc)

    def _table(self) -> bytes:
        entries = b"".join(record.entry() for record in self.records)
        count, end = len(self.records), self._table_at + len(entries)
        large = struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, len(entries), self._table_at
        )
        where = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
        return (
            entries + large + where + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _LARGE, _LARGE, 0)
        )
