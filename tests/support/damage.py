"""What tests do to files, and to copies of whole directories."""

from __future__ import annotations

import shutil
from pathlib import Path


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
