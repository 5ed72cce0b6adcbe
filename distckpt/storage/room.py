"""How much memory is to spare for what the system keeps of files, and has to give back as soon as anybody needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distckpt.storage.node import ranks_here

SHARE = 4
"""Of the memory that is available a file, together with those of the other ranks on the host, may take one part of four."""

_GROUPS = "/sys/fs/cgroup"
_UNLIMITED = 1 << 60


def has_room(nbytes: int) -> bool:
    """Whether memory can keep a file of that size from each rank of this host within the budget."""
    return nbytes * ranks_here() * SHARE <= available()


def available() -> int:
    """Bytes that can be had without taking any from a process: those of the host, or what the container's limit leaves.

    0 where the system does not say.
    """
    host = _number_in("/proc/meminfo", "MemAvailable:") * 1024
    return min([host, *_left_to_groups()])


def _left_to_groups() -> Iterator[int]:
    """What the limit of each control group around this process leaves, files that memory keeps not counted."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.rstrip("\n").split(":", 2)
        if controllers == "":
            yield from _left(_GROUPS, path, "memory.max", "memory.current", ("active_file", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("total_active_file", "total_inactive_file")
            yield from _left(f"{_GROUPS}/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", names)


def _left(root: str, path: str, limit: str, usage: str, files: tuple[str, str]) -> Iterator[int]:
    # Inside of a container the groups around it are not to be seen, and its own may be the root.
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts) + 1):
        folder = "/".join((root, *parts[:depth]))
        most = _number_in(f"{folder}/{limit}")
        if 0 < most < _UNLIMITED:
            kept = sum(_number_in(f"{folder}/memory.stat", name) for name in files)
            yield max(0, most - _number_in(f"{folder}/{usage}") + kept)


def _number_in(path: str, name: str = "") -> int:
    """The number after ``name`` in a file of the system's; 0 if there is none, such as ``max``."""
    for line in _lines(path):
        first, *rest = line.split() or [""]
        word = first if not name else rest[0] if first == name and rest else ""
        if word.isdigit():
            return int(word)
    return 0


def _lines(path: str) -> Iterator[str]:
    with contextlib.suppress(OSError), open(path) as file:
        yield from file
