"""Large sequential writes: round the page cache wherever file system, memory and position allow it, or through it, for
readers that come soon, and on to the disk at once."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

PAGE = 4096
WRITE_BYTES = 32 << 20
KEPT_WRITE_BYTES = 8 << 20
"""Through the page cache: so much is copied there, then sent on to the disk while the next piece is copied."""

_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class SequentialFile:
    """Writes sections one after the other to the new file open at ``fd``, from its start.

    With ``direct`` the page-aligned part of each section is written with O_DIRECT, the rest through the page cache.
    A file system that refuses O_DIRECT gets everything through the page cache. What goes through it is on its way to
    the disk when the next piece is written, so that little is left for the sync at the end.
    """

    def __init__(self, fd: int, *, direct: bool) -> None:
        self._fd = fd
        self._allowed = direct and _O_DIRECT != 0
        self._is_direct = False
        self._position = 0

    @property
    def position(self) -> int:
        """How many bytes have been written."""
        return self._position

    def write(self, section: memoryview) -> None:
        """Write all of ``section``, plain bytes, in pieces of up to 32 MiB. Raises OSError."""
        while section.nbytes:
            piece = section[:WRITE_BYTES]
            whole_pages = self._direct_bytes(piece)
            self._switch(direct=whole_pages > 0)
            written = self._write_piece(piece[:whole_pages] if self._is_direct else piece[:KEPT_WRITE_BYTES])
            if not self._is_direct:
                _begin_writing(self._fd, self._position, written)
            self._position += written
            section = section[written:]

    def _direct_bytes(self, piece: memoryview) -> int:
        if not self._allowed or self._position % PAGE or _address(piece) % PAGE:
            return 0
        return piece.nbytes // PAGE * PAGE

    def _switch(self, *, direct: bool) -> None:
        if direct == self._is_direct:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
        except OSError:
            if not direct:
                raise
            self._allowed = False  # the file system has no O_DIRECT
        else:
            self._is_direct = direct

    def _write_piece(self, piece: memoryview) -> int:
        try:
            return os.pwrite(self._fd, piece, self._position)
        except OSError as error:
            if not self._is_direct or error.errno != errno.EINVAL:
                raise
            self._allowed = False  # the device wants a coarser alignment than a page
            return 0


def _address(piece: memoryview) -> int:
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data)


def _begin_writing(fd: int, position: int, nbytes: int) -> None:
    """Have the system write these bytes of its cache to the disk now. It may not know how: the sync comes in any case."""
    call = _sync_file_range()
    if call is not None:
        call(fd, position, nbytes, _BEGIN_WRITING)


@functools.cache
def _sync_file_range() -> Callable[..., Any] | None:
    """Linux's own; Python has no name for it."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
