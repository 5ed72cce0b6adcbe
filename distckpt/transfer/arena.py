"""Memory for staging: touched once, so that every copy into it runs at full speed, and pinned when there is a GPU."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch

from distckpt.errors import SaveError

GRANULE = 1 << 20
_MADV_WIPEONFORK = 18  # Linux 4.14 and, below, 5.14; the mmap module has no names for them
_MADV_POPULATE_WRITE = 23
_HOST_REGISTER_PORTABLE = 1  # pinned for every CUDA context of the process


class Arena:
    """At least ``size`` bytes of zeros, page-aligned, present in memory from the start. MemoryError if there are not enough.

    It is anonymous memory, so nothing of it stays behind when the process is killed.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-max(size, 1) // GRANULE) * GRANULE
        self._memory: mmap.mmap | None = _allocate(self.size)
        self._unpin: weakref.finalize[[int, int], Arena] | None = None

    @property
    def view(self) -> memoryview:
        """All of it, writable. ValueError once it is closed."""
        return memoryview(self._open())

    @property
    def pinned(self) -> bool:
        """Whether CUDA copies into it without a detour."""
        return self._unpin is not None

    def tensor(self, position: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes from ``position`` on as a uint8 tensor over this very memory."""
        if not 0 <= position <= position + nbytes <= self.size:
            raise ValueError(f"bytes {position} to {position + nbytes} are not inside {self.size} bytes")
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._open(), dtype=torch.uint8, count=nbytes, offset=position)

    def pin(self) -> None:
        """Register it with CUDA, so that the GPU copies into it directly. SaveError if CUDA refuses."""
        if self.pinned:
            return
        address = self.tensor(0, self.size).data_ptr()
        failure = int(_cudart().cudaHostRegister(address, self.size, _HOST_REGISTER_PORTABLE))
        if failure:
            raise SaveError(
                None,
                f"CUDA cannot pin a staging buffer of {self.size} bytes (error {failure}). Is 'ulimit -l' too low?",
            )
        self._unpin = weakref.finalize(self, _unregister, address, os.getpid())

    def close(self) -> None:
        """Let the memory go: it is returned to the system with the last tensor or view of it. Closing twice does no harm."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._memory = None

    def _open(self) -> mmap.mmap:
        if self._memory is None:
            raise ValueError("the arena is closed")
        return self._memory


def _allocate(size: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A forked child (a data loader's worker, say) gets zeros instead of these pages. Shared with it, each page would
        # have to be copied again at the next save, and the GPU could write to the copy that is no longer ours. Not
        # MADV_DONTFORK: the child could then map something else there, and its own clean-up would unmap that.
        _advise(memory, _MADV_WIPEONFORK)
        _advise(memory, mmap.MADV_HUGEPAGE)
        if not _advise(memory, _MADV_POPULATE_WRITE):
            np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 0
    except OSError as error:
        raise MemoryError(f"no memory for a staging buffer of {size} bytes: {error}") from error
    return memory


def _advise(memory: mmap.mmap, advice: int) -> bool:
    """Whether the kernel took the advice; it may not know it."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        return False
    return True


def _unregister(address: int, owner: int) -> None:
    # A forked child has no CUDA registration to undo. A failure means that CUDA has been shut down, and it is undone.
    if os.getpid() == owner:
        _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
