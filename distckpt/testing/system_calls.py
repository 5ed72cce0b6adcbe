"""The system calls by which a process works on files: counted, failed on cue, and recorded, in the process itself.

A library that the process preloads stands between it and libc. ``build`` compiles it, and ``preloading`` is what the
environment of the process needs. In the process, ``SystemCalls`` says what to do with the calls on files below one
folder::

    # in a test
    library = build(folder)
    subprocess.run([...], env={**os.environ, **preloading(library)})

    # in the process
    calls = SystemCalls("/tmp/run")
    calls.fail(Failure(("write",), nth=17, error=errno.ENOSPC))

Try an operation once and look at ``counted``; then fail each of these calls in a process of its own. A record says what
changed in which order; ``distckpt.testing.power_loss`` makes of it what a power loss may leave.

Needs Linux, glibc 2.33 or newer, and a C compiler.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal[
    "open", "create", "read", "write", "sync", "link", "unlink", "rename", "mkdir", "rmdir", "list", "entry", "stat",
    "close", "flags", "truncate",
]  # fmt: skip
"""What a call does: "open" one that creates nothing, "list" opens a folder and "entry" reads one name of it, "flags"
switches O_DIRECT, "read" and "write" are all calls that move bytes, "sync" is fsync and fdatasync."""

How = Literal["before", "after", "short", "pretend"]
"""What becomes of a call: nothing is done and it fails; it is done and fails, for the answer was lost; half of the bytes
are read or written, which is no failure; nothing is done and it succeeds, which is a lie."""

SOURCE = Path(__file__).with_suffix(".c")
KINDS: Sequence[Kind] = get_args(Kind)
_HOWS: Sequence[How] = get_args(How)
_FLAGS = ["-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wno-attribute-alias"]


class NoCompilerError(RuntimeError):
    """There is no C compiler on this machine, or it cannot compile the library."""


def build(folder: str | os.PathLike[str]) -> Path:
    """Compile the library into ``folder``; its path. NoCompilerError if that cannot be done."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompilerError("failing system calls needs a C compiler: install gcc or clang, or set CC")
    library = Path(folder, "distckpt-system-calls.so")
    command = [compiler, *_FLAGS, str(SOURCE), "-o", str(library), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompilerError(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


def preloading(library: str | os.PathLike[str]) -> Mapping[str, str]:
    """The environment variables with which a process preloads the library."""
    others = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{os.fspath(library)}:{others}" if others else os.fspath(library)}


@dataclass(frozen=True, slots=True)
class Failure:
    """From the ``nth`` call of these kinds on, which is 0 at first, so many fail; ``times=None``: all that follow."""

    kinds: tuple[Kind, ...]
    nth: int
    how: How = "before"
    error: int = errno.EIO
    times: int | None = 1

    def __str__(self) -> str:
        """``write:17:before:ENOSPC:1``, of which ``parse`` makes it again."""
        times = "on" if self.times is None else self.times
        return f"{'+'.join(self.kinds)}:{self.nth}:{self.how}:{errno.errorcode[self.error]}:{times}"

    @classmethod
    def parse(cls, text: str) -> Failure:
        """What ``str`` made this text of. ValueError if it made it of none."""
        try:
            kinds, nth, how, error, times = text.split(":")
            return cls(
                tuple(KINDS[KINDS.index(kind)] for kind in kinds.split("+")),
                int(nth),
                _HOWS[_HOWS.index(how)],
                getattr(errno, error),
                None if times == "on" else int(times),
            )
        except (ValueError, AttributeError) as wrong:
            raise ValueError(f"{text!r} is no failure; one is write:17:before:ENOSPC:1") from wrong


class SystemCalls:
    """The calls of this process, which has preloaded the library, on files below ``folder``, an absolute real path.

    One at a time: a second one takes over, and counts anew. RuntimeError if the library has not been preloaded.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._library: Any = ctypes.CDLL(None)
        if not hasattr(self._library, "calls_watch"):
            raise RuntimeError("this process was not started with what preloading() gives")
        self._library.calls_struck.restype = ctypes.c_char_p
        self._library.calls_counted.restype = ctypes.c_long
        self._library.calls_fail.argtypes = [ctypes.c_uint, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._library.calls_watch(os.fsencode(os.path.realpath(folder)))

    def stop(self) -> None:
        """Let all calls through again."""
        self._library.calls_watch(None)

    @property
    def counted(self) -> dict[Kind, int]:
        """How many calls of each kind there have been."""
        return {kind: self._library.calls_counted(at) for at, kind in enumerate(KINDS)}

    @property
    def struck(self) -> str:
        """The first call that the failure has struck, "write /tmp/run/file"; "" if none."""
        return os.fsdecode(self._library.calls_struck())

    def fail(self, failure: Failure) -> None:
        """Have these calls fail, counted from now on."""
        bits = sum(1 << KINDS.index(kind) for kind in failure.kinds)
        times = -1 if failure.times is None else failure.times
        self._library.calls_fail(bits, failure.nth, times, 1 + _HOWS.index(failure.how), failure.error)

    def record(self, path: str | os.PathLike[str]) -> None:
        """From now on record what changes something, in a file outside of the folder. OSError if it cannot be made."""
        if self._library.calls_record(os.fsencode(path)):
            raise OSError(f"{os.fspath(path)} cannot be written")

    def mark(self, text: str) -> None:
        """Put a word of this process into the record, at its place among the calls."""
        self._library.calls_mark(text.encode())
