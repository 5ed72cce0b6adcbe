"""What kind of object has which name: all that a store knows of what it holds. ``format/names.py`` makes the names."""

from __future__ import annotations

import re

_ATTEMPT = r"(?:[^/]+/)?e[0-9]{1,18}-[0-9a-f]{32}"
_ATTEMPT_FOLDER = re.compile(_ATTEMPT)
_SHARD = re.compile(rf"{_ATTEMPT}/[0-9]{{5,}}-[0-9]+\.arrow")
_LASTING = re.compile(rf"{_ATTEMPT}/(?:[0-9]{{5,}}-[0-9]+|index)\.arrow")


def is_shard(path: str) -> bool:
    """Whether it is a shard: large, and written once."""
    return _SHARD.fullmatch(path) is not None


def holds_shards(folder: str) -> bool:
    """Whether it is the folder of an attempt."""
    return _ATTEMPT_FOLDER.fullmatch(folder) is not None


def is_lasting(path: str) -> bool:
    """Whether it is a shard or an index: whatever has once been there can be nothing else, as attempts are unique."""
    return _LASTING.fullmatch(path) is not None
