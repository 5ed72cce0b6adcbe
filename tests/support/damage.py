"""What tests do to files, and to copies of whole directories."""

from __future__ import annotations

import shutil
from pathlib import Path

from distckpt.directory.locate import locate, read_index
from distckpt.format import names


def copied(directory: Path, parent: Path, name: str = "run") -> Path:
    """The same directory again, as ``name`` in ``parent``."""
    return Path(shutil.copytree(directory, parent / name))


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Turn one bit over, in place."""
    with file.open("r+b", buffering=0) as content:
        content.seek(position)
        (byte,) = content.read(1)
        content.seek(position)
        content.write(bytes([byte ^ 1 << bit]))


def payload_of(path: Path, key: str) -> tuple[Path, int]:
    """The shard that has the first chunk of ``key``, and where in it that ends."""
    where = locate(path)
    index = read_index(where)
    row = int(index.rows(key)[0])
    shard = names.shard_name(int(index.rank[row]), int(index.shard[row]))
    return Path(where.store.url, where.folder, shard), int(index.position[row] + index.size[row])
