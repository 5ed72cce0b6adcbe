"""The largest numbers that a file of ours can honestly hold. What is beyond them is damage, whatever its checksum."""

from __future__ import annotations

MAX_WORLD = 1 << 20
MAX_SHARDS_OF_RANK = 1 << 20
MAX_NUMBER = 10**18 - 1
MAX_BYTES = 1 << 60
MAX_INDEX_BYTES = 4 << 30
MAX_CRC32C = (1 << 32) - 1
MAX_DIMENSIONS = 32
"""numpy 1's own limit; torch goes to 64, and models to about 6."""


def shown(text: str) -> str:
    """A name from a file, short enough and harmless to print."""
    return repr(text[:80])
