"""What may come at any line of our code: memory that runs out, in whatever thread, or Ctrl-C in the main one."""

from __future__ import annotations

import dis
import linecache
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import distckpt

PACKAGE = str(Path(distckpt.__file__).parent)
NOP = dis.opmap["NOP"]


class Pressure:
    """Inside, the ``at``-th line that is executed in the modules below ``folders`` of the package raises ``error``.

    That is a MemoryError, or a KeyboardInterrupt, which comes in the main thread alone.

    Threads count that begin inside; functions whose names are in ``but`` do not. Nor do lines that need no memory:
    ``try``, and ``with``, which releases a lock at its end. ``lines`` says how many have been executed, ``struck``
    which one it was.
    """

    def __init__(
        self,
        folders: Sequence[str],
        at: int | None,
        but: Collection[str] = (),
        error: type[MemoryError | KeyboardInterrupt] = MemoryError,
    ) -> None:
        self.lines = 0
        self.struck = ""
        self._places = tuple(f"{PACKAGE}/{folder}/" for folder in folders)
        self._but = frozenset(but)
        self._at = at
        self._error = error
        self._is_over = False
        self._lock = threading.Lock()

    def __enter__(self) -> Pressure:
        if self._error is MemoryError:
            threading.settrace(self._enter)
        sys.settrace(self._enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(None)
        threading.settrace(None)
        self._is_over = True

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        return self._pass if code.co_filename.startswith(self._places) and code.co_name not in self._but else None

    def _pass(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and not self._is_over and _takes_memory(frame):
            with self._lock:
                self.lines += 1
                if self.lines == self._at:
                    code = frame.f_code
                    place = code.co_filename.removeprefix(f"{PACKAGE}/")
                    self.struck = f"{place}:{frame.f_lineno} in {code.co_name}"
                    raise self._error(f"at a line of {code.co_name}")
        return self._pass


def _takes_memory(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_code[frame.f_lasti] == NOP:
        return False
    return not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with ")
