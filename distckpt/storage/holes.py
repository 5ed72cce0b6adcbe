"""Files that are large in name only: a hole takes no room on a disk, and all of its size in the memory of a reader."""

from __future__ import annotations

import errno
import os

SMALL_BYTES = 1 << 20
LEAST_PART = 64
"""No honest file of ours is less than a 64th data. It may have holes: some file systems leave out blocks of zeros."""

_BLOCK = 512
_DATA, _HOLE = getattr(os, "SEEK_DATA", None), getattr(os, "SEEK_HOLE", None)


def is_hollow(fd: int, status: os.stat_result) -> bool:
    """Whether the file is large, and hardly any of it is there. False where that cannot be told. Raises OSError."""
    least = status.st_size // LEAST_PART
    if status.st_size <= SMALL_BYTES or status.st_blocks * _BLOCK >= least:
        return False
    # Compression makes blocks few too, and some network file systems count none: only holes prove it.
    return _has_holes_but_for(fd, status.st_size, least)


def _has_holes_but_for(fd: int, size: int, most: int) -> bool:
    """Whether the file has less than ``most`` bytes of data. Looks no further than it must."""
    if _DATA is None or _HOLE is None:
        return False
    data = at = 0
    while data < most and at < size:
        try:
            begin = os.lseek(fd, at, _DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return True
            if error.errno == errno.EINVAL:  # a file system that knows no holes
                return False
            raise
        at = os.lseek(fd, begin, _HOLE)
        data += at - begin
    return data < most
