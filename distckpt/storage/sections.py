"""How a large object travels to a store: section by section, one being written while the next is being produced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

SECTION_MULTIPLE = 1 << 20
"""Every section but the last is a multiple of this many bytes long."""


def checked(size: int, sections: Iterable[memoryview]) -> Iterator[memoryview]:
    """The sections as plain bytes, empty ones left out. ValueError if they do not sum to ``size`` bytes, or if one
    but the last is no multiple of 1 MiB."""
    done = 0
    for section in sections:
        done += section.nbytes
        if done > size:
            raise ValueError(f"the sections hold more than the {size} bytes that were announced")
        if done < size and section.nbytes % SECTION_MULTIPLE:
            raise ValueError(f"a section of {section.nbytes} bytes, not a multiple of 1 MiB, is not the last one")
        if section.nbytes:
            yield section.cast("B")
    if done != size:
        raise ValueError(f"the sections hold {done} bytes, but {size} were announced")


def write_behind(sections: Iterable[memoryview], write: Callable[[memoryview], object]) -> None:
    """Give every section to ``write``, in order, in a thread beside the one that produces the next section.

    When a section is asked for, at most the one before it is still being written. Returns, or raises, with nothing being
    written any more. The first failure of ``write`` ends it.
    """
    writing: _Writing | None = None
    try:
        for section in sections:
            if writing is not None:
                writing.result()
            writing = _Writing(write, section)
        if writing is not None:
            writing.result()
    finally:
        if writing is not None:
            writing.wait()


class _Writing:
    """One section on its way."""

    def __init__(self, write: Callable[[memoryview], object], section: memoryview) -> None:
        self._error: BaseException | None = None
        # A daemon: the interpreter does not wait for a store that hangs, and ``write_behind`` for every section it has begun.
        self._thread: threading.Thread | None = threading.Thread(target=self._run, args=(write, section), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # an interpreter that is shutting down starts no threads, but a save under way must end
            self._thread = None
            self._run(write, section)

    def _run(self, write: Callable[[memoryview], object], section: memoryview) -> None:
        try:
            write(section)
        except BaseException as error:  # noqa: BLE001  carried over to the thread that waits, which raises it
            self._error = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> None:
        self.wait()
        if self._error is not None:
            raise self._error
