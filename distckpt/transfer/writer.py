"""Writing a staged shard to a store: its memory goes out as it is, section by section, checksums filled in on the way."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import crc32c
import numpy as np

from distckpt.errors import DamagedError
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.storage.around import cool
from distckpt.storage.interface import ObjectInfo, Store
from distckpt.storage.patience import twice
from distckpt.storage.split import place_of
from distckpt.transfer.checksums import stored_size_and_crc
from distckpt.transfer.staging import StagedShard

SECTION_BYTES = 32 << 20


def write_shard(
    store: Store,
    path: str,
    shard: StagedShard,
    section_bytes: int = SECTION_BYTES,
    wrote: Callable[[int], object] = bool,
) -> ShardReceipt:
    """Write what was last staged, once it has all arrived; durable on return.

    ``section_bytes`` is a multiple of 1 MiB. ``wrote`` is called with the bytes of each section on its way. Raises
    StorageError, DamagedError if the store took in something else, or SaveError if a tensor changed while it was copied.
    """
    if shard.copied is None:
        raise ValueError("nothing has been staged")
    shard.copied.wait()
    shard.copied.check()
    sums = _Sums(shard)
    info = store.put_unique(path, shard.image.size, sums.sections(section_bytes, wrote))
    receipt = sums.receipt()
    if _difference(info, receipt):
        info = store.stat(path) or info  # the answer may have come damaged, and not the shard
    if difference := _difference(info, receipt):
        raise DamagedError(place_of(store, path), difference)
    return receipt


def read_back(store: Store, path: str, receipt: ShardReceipt) -> None:
    """Read what was written once more, not what memory keeps of it. DamagedError if the store returns something else."""

    def compare() -> None:
        cool(store, path)
        if stored_size_and_crc(store, path) != (receipt.size, receipt.crc32c):
            raise DamagedError(place_of(store, path), "what the store returns is not what was written")

    twice(compare)


def _difference(info: ObjectInfo, receipt: ShardReceipt) -> str:
    """What is wrong with what the store says it holds; '' if nothing is."""
    if info.size != receipt.size:
        return f"the store holds {info.size} bytes, {receipt.size} were written"
    if info.crc32c is not None and info.crc32c != receipt.crc32c:
        return f"the store holds bytes of CRC32C {info.crc32c:08x}, not {receipt.crc32c:08x}"
    return ""


class _Sums:
    """The CRCs of one pass over a shard, each computed just before the section that it is written in goes out."""

    def __init__(self, shard: StagedShard) -> None:
        self._shard = shard
        self._content = shard.content
        self._blocks: list[int] = []
        self._rows: list[int] = []

    def sections(self, nbytes: int, wrote: Callable[[int], object]) -> Iterator[memoryview]:
        """The shard's bytes in order."""
        image = self._shard.image
        last_rows = np.searchsorted(image.crc_positions, np.arange(nbytes, image.size + nbytes, nbytes)).tolist()
        for number, last_row in enumerate(last_rows):
            self._fill_in(last_row)
            yield (section := self._content[number * nbytes : (number + 1) * nbytes])
            wrote(section.nbytes)

    def receipt(self) -> ShardReceipt:
        """What the pass has found. To be asked for when every section has been taken."""
        image = self._shard.image
        return ShardReceipt(
            shard=self._shard.number,
            size=image.size,
            crc32c=self._shard.file_crc.of(np.array(self._rows, dtype=np.uint32)),
            rows=len(image.chunks),
            positions=image.positions.astype("<i8").tobytes(),
            sizes=image.sizes.astype("<i8").tobytes(),
            block_sizes=image.block_sizes.astype("<i8").tobytes(),
            blocks=np.array(self._blocks, dtype="<u4").tobytes(),
        )

    def _fill_in(self, last_row: int) -> None:
        """Compute and put in place the CRCs of all rows before ``last_row`` that have none yet."""
        image, rows = self._shard.image, slice(len(self._rows), last_row)
        columns = (image.positions, image.sizes, image.block_sizes, image.crc_positions)
        for position, size, block, crc_position in zip(*(column[rows].tolist() for column in columns), strict=True):
            crc = self._sum(position, size, block)
            self._rows.append(crc)
            struct.pack_into("<I", self._content, crc_position, crc)

    def _sum(self, position: int, size: int, block: int) -> int:
        content, end, crc = self._content, position + size, 0
        for start in range(position, max(end, position + 1), block):
            crc = crc32c.crc32c(content[start : min(start + block, end)], crc)
            self._blocks.append(crc)
        return crc
