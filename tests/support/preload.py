"""The library that attacked processes preload."""

from __future__ import annotations

import functools
import tempfile

from distckpt.testing.system_calls import build


@functools.cache
def library() -> str:
    """Compiled once for this process. NoCompilerError."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="distckpt-soak-"))
    return str(build(_FOLDERS[-1].name))


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""They go with this process."""
