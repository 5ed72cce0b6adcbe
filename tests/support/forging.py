"""Checkpoints copied alone, made to say other things, with every checksum right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import msgspec
import pyarrow as pa

from distckpt.format import names
from distckpt.format.arrow.index_encoding import SCHEMA
from distckpt.format.json.manifest import Manifest, ShardRecord
from distckpt.format.json.sealed import seal, unseal

PIECE = 8 << 20


def manifest_of(path: Path) -> tuple[Path, Manifest]:
    """The manifest of a copy."""
    file = next(path.glob(f"*/{names.MANIFEST}"))
    return file, unseal(file.read_bytes(), Manifest, str(file), 1 << 20)


def forge_index(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Write other rows into the index of a copy, and a manifest that vouches for them."""
    file, manifest = manifest_of(path)
    index = file.with_name(names.INDEX)
    rows = pa.ipc.open_file(index.read_bytes()).read_all().to_pylist()
    change(rows)
    columns = [pa.array([row[field.name] for row in rows], _plain(field.type)).cast(field.type) for field in SCHEMA]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch([_unified(column) for column in columns], schema=SCHEMA))
    data = sink.getvalue().to_pybytes()
    index.write_bytes(data)
    forged = msgspec.structs.replace(manifest, index_size=len(data), index_crc32c=crc32c.crc32c(data))
    file.write_bytes(seal(forged))


def _plain(kind: Any) -> Any:
    return pa.utf8() if pa.types.is_dictionary(kind) else kind


def _unified(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def vouch(path: Path) -> None:
    """Write a manifest that vouches for the files of a copy, whatever they are by now."""
    file, manifest = manifest_of(path)
    index_size, index_crc32c = size_and_crc(file.with_name(names.INDEX))
    shards = tuple(
        ShardRecord(shard.rank, shard.shard, *size_and_crc(file.with_name(names.shard_name(shard.rank, shard.shard))))
        for shard in manifest.shards
    )
    file.write_bytes(
        seal(msgspec.structs.replace(manifest, index_size=index_size, index_crc32c=index_crc32c, shards=shards))
    )


def size_and_crc(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC32C of a file, which may be larger than there is memory."""
    crc = 0
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            crc = crc32c.crc32c(piece, crc)
    return file.stat().st_size, crc
