"""Shards as any other program reads them: plain Arrow files."""

from __future__ import annotations

from typing import Any

import crc32c
import pyarrow as pa


def rows_of(data: bytes) -> list[dict[str, Any]]:
    """Every row of a whole shard, whose bytes have the CRC32C that stands beside them."""
    table = pa.ipc.open_file(data).read_all()
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [crc32c.crc32c(row["data"]) for row in rows] == [row["crc32c"] for row in rows]
    return rows
