"""What a rank says of a shard that has landed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """One shard that has landed: its size and CRC32C, and for each of its rows, in order, where the bytes are.

    ``rows`` counts them. ``positions`` and ``sizes`` are int64, ``block_sizes`` int64, ``blocks`` the uint32 running
    CRC32C of every row at each of its block ends; all little endian. A row of n bytes has max(1, ceil(n / block size))
    blocks, and the last running value is the row's CRC32C.
    """

    shard: int
    size: int
    crc32c: int
    rows: int
    positions: bytes = field(repr=False)
    sizes: bytes = field(repr=False)
    block_sizes: bytes = field(repr=False)
    blocks: bytes = field(repr=False)
