"""A shard: the exact bytes of an Arrow IPC file, known before any payload is, with places left for payloads and CRCs.

One record batch a chunk; consecutive chunks under 64 KiB share a batch of up to 1 MiB, where their bytes lie one after
the other. A batch's payload starts at a multiple of 8 bytes, which is what pyarrow's writer aligns to.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from distckpt.errors import SaveError
from distckpt.format.arrays import Ints
from distckpt.format.arrow.columns import DIMENSIONS, FORMAT_FIELD, texts, tuples

FORMAT = b"1"
SMALL_BYTES = 64 << 10
BATCH_BYTES = 1 << 20
MOST_BLOCKS = 64
MAP_NORESERVE = 0x4000  # mmap has the name from Python 3.13 on
_PROT_NONE = 0

SCHEMA = pa.schema(
    [
        ("key", pa.utf8()),
        ("dtype", pa.utf8()),
        ("shape", pa.list_(pa.int64())),
        ("offset", pa.list_(pa.int64())),
        ("length", pa.list_(pa.int64())),
        ("crc32c", pa.uint32()),
        ("data", pa.large_binary()),
    ],
    metadata={FORMAT_FIELD: FORMAT},
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A hyper-rectangle of one tensor, or a plain value (dtype ``json``, no dimensions); ``nbytes`` in the shard."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    length: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ShardImage:
    """Where every byte of a shard of ``size`` bytes goes.

    ``fixed`` are (position, bytes) of all that is not payload, CRC places included, as zeros; with the payloads they
    cover the file exactly. Per chunk, in order, int64: ``positions`` and ``sizes`` of the payload, ``crc_positions`` of
    its CRC32C (4 bytes, little endian, ascending and each before its payload), ``block_sizes`` as block_size has it.
    """

    chunks: tuple[Chunk, ...] = field(repr=False)
    size: int
    fixed: tuple[tuple[int, bytes], ...] = field(repr=False)
    positions: Ints = field(repr=False)
    sizes: Ints = field(repr=False)
    crc_positions: Ints = field(repr=False)
    block_sizes: Ints = field(repr=False)


def block_size(nbytes: int, row_nbytes: int) -> int:
    """Bytes of a block of a chunk of ``nbytes``, whose indices of dimension 0 take ``row_nbytes`` each (0: it has none).

    At most 64 blocks a chunk, none under 64 KiB. They are made of whole indices of dimension 0, as many as divide the
    chunk well; only where there are few and huge ones is each cut into equal parts.
    """
    if nbytes < SMALL_BYTES or row_nbytes <= 0:
        return max(1, nbytes)
    rows = nbytes // row_nbytes
    if rows < MOST_BLOCKS and row_nbytes >= 2 * SMALL_BYTES:
        return row_nbytes // _parts(row_nbytes, MOST_BLOCKS // rows)
    if rows % MOST_BLOCKS == 0 and nbytes >= MOST_BLOCKS * SMALL_BYTES:
        return nbytes // MOST_BLOCKS
    least = max(-(-rows // MOST_BLOCKS), -(-SMALL_BYTES // row_nbytes))
    return min(nbytes, _power_of_two(least) * row_nbytes)


def _parts(row_nbytes: int, most: int) -> int:
    """The largest power of two up to ``most`` that cuts a row into equal parts of whole 64 bytes, none under 64 KiB."""
    parts = 1
    while parts * 2 <= most and row_nbytes % (parts * 128) == 0 and row_nbytes // (parts * 2) >= SMALL_BYTES:
        parts *= 2
    return parts


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _block_size_of(chunk: Chunk) -> int:
    rows = chunk.length[0] if chunk.length else 0
    return block_size(chunk.nbytes, chunk.nbytes // rows if rows else 0)


# ---- the image ----------------------------------------------------------------------------------------------------


def build_image(chunks: Sequence[Chunk]) -> ShardImage:
    """Lay out a shard with these chunks, in this order. No payload memory is needed or touched.

    Raises ValueError for a chunk with a negative size or a key that is not valid Unicode.
    """
    sizes = np.array([chunk.nbytes for chunk in chunks], dtype=np.int64)
    if np.any(sizes < 0):
        raise ValueError("a chunk cannot have a negative number of bytes")
    starts = np.zeros(len(chunks) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    # Addresses that stand for the payload and CRCs while Arrow lays out the file; the first are never backed by memory.
    payload = pa.py_buffer(_reserve(int(starts[-1])))
    crcs = pa.py_buffer(bytes(max(8, 4 * len(chunks))))
    sink = _Sink(payload, crcs)
    places = _Places(np.zeros_like(sizes), np.zeros_like(sizes))
    _write(sink, _rows(chunks, starts, payload, crcs), starts, places)
    blocks = np.array([_block_size_of(chunk) for chunk in chunks], dtype=np.int64)
    return ShardImage(tuple(chunks), sink.position, tuple(sink.fixed()), places.payloads, sizes, places.crcs, blocks)


@dataclass(frozen=True, slots=True)
class _Places:
    payloads: Ints
    crcs: Ints


def _reserve(nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return mmap.mmap(-1, max(1, nbytes), flags=flags, prot=_PROT_NONE)


def _rows(chunks: Sequence[Chunk], starts: Ints, payload: pa.Buffer, crcs: pa.Buffer) -> pa.RecordBatch:
    dimensions = [tuples([getattr(chunk, name) for chunk in chunks], pa.list_(pa.int64())) for name in DIMENSIONS]
    count = len(chunks)
    columns: list[Any] = [
        texts([chunk.key for chunk in chunks]),
        texts([chunk.dtype for chunk in chunks]),
        *dimensions,
        pa.Array.from_buffers(pa.uint32(), count, [None, crcs]),
        pa.Array.from_buffers(pa.large_binary(), count, [None, pa.py_buffer(starts.tobytes()), payload]),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _write(sink: _Sink, rows: pa.RecordBatch, starts: Ints, places: _Places) -> None:
    writer = pa.ipc.new_file(pa.PythonFile(sink, mode="w"), SCHEMA)
    for first, end in _batches(np.diff(starts).tolist()):
        sink.expect(int(starts[end] - starts[first]))
        writer.write_batch(rows.slice(first, end - first))
        payload, crc = sink.found()
        places.payloads[first:end] = payload + (starts[first:end] - starts[first])
        places.crcs[first:end] = crc + 4 * np.arange(end - first)
    writer.close()


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First chunk of each batch and the one after its last."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        joins = size < SMALL_BYTES and sizes[index - 1] < SMALL_BYTES and total + size <= BATCH_BYTES
        if index > first and not joins:
            yield first, index
            first, total = index, 0
        total += size
    if sizes:
        yield first, len(sizes)


class _Sink(io.RawIOBase):
    """What Arrow writes the file to. Keeps all bytes but those of payloads, and where payloads and CRCs fall.

    Arrow hands its buffers on as they are, so a payload is known by its address.
    """

    def __init__(self, payload: pa.Buffer, crcs: pa.Buffer) -> None:
        super().__init__()
        self.position = 0
        self._payload = range(payload.address, payload.address + payload.size)
        self._crcs = range(crcs.address, crcs.address + crcs.size)
        self._texts: list[tuple[int, bytearray]] = [(0, bytearray())]
        self._expected = 0
        self._payload_at: int | None = None
        self._crc_at: int | None = None

    def expect(self, payload_nbytes: int) -> None:
        """A batch with a payload of so many bytes comes."""
        self._expected = payload_nbytes
        self._payload_at = self._crc_at = None

    def found(self) -> tuple[int, int]:
        """Where the payload and the first CRC of the batch that has come lie."""
        payload_at = self._payload_at if self._expected else self.position
        if payload_at is None or self._crc_at is None:
            raise SaveError(None, f"pyarrow {pa.__version__} copies what it writes, so a shard cannot be laid out")
        return payload_at, self._crc_at

    def fixed(self) -> Iterator[tuple[int, bytes]]:
        """All bytes but payloads, neighbours merged."""
        return ((position, bytes(text)) for position, text in self._texts if text)

    def write(self, data: Any) -> int:
        size = len(data)
        if isinstance(data, pa.Buffer):
            if data.address in self._payload:
                self._skip_payload(size)
                return size
            if data.address in self._crcs:
                self._crc_at = self.position
        self._texts[-1][1].extend(data)
        self.position += size
        return size

    def _skip_payload(self, size: int) -> None:
        # Arrow rounds up to 8 bytes by taking some of the next chunk's; padding is what they stand for.
        self._payload_at = self.position
        self._texts.append((self.position + self._expected, bytearray(size - self._expected)))
        self.position += size

    def tell(self) -> int:
        return self.position

    def writable(self) -> bool:
        return True
