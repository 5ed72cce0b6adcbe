"""A store that fails on cue, and remembers what was asked of it.

Run an operation once with no faults and look at ``calls``; then run it again for each of them and for each fault that
``faults_of`` its operation names::

    for call in quiet.calls:
        for fault in faults_of(call.operation):
            store = FaultyStore(MemoryStore(), FaultAt(call.index, fault))
            ...
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from distckpt.errors import (
    AlreadyExistsError,
    DamagedError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
)
from distckpt.storage.interface import ObjectInfo, Source, Store, SupportsHidden, SupportsSweep
from distckpt.storage.sections import SECTION_MULTIPLE
from distckpt.testing.faults import (
    Call,
    Fault,
    FaultAt,
    FaultOn,
    NoFaults,
    Operation,
    Outcome,
    RandomFaults,
    Script,
    faults_of,
    rewritten,
)

__all__ = [
    "Call",
    "Fault",
    "FaultAt",
    "FaultOn",
    "FaultyStore",
    "NoFaults",
    "RandomFaults",
    "Script",
    "faults_of",
    "rewritten",
]

T = TypeVar("T")


class FaultyStore:
    """Any store, with the faults that ``script`` chooses. Safe to use from several threads.

    Opened objects count too: each ``read_into`` is a call. ``delay`` is the length of DELAYED in seconds.
    """

    def __init__(
        self,
        inner: Store,
        script: Script | None = None,
        *,
        delay: float = 0.01,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.script: Script = script or NoFaults()
        self._delay = delay
        self._sleep = sleep
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._counts: dict[tuple[Operation, str], int] = {}
        self._late: list[Callable[[], object]] = []
        self._is_gone = False

    @property
    def calls(self) -> tuple[Call, ...]:
        """The history so far, in the order in which the calls began."""
        with self._lock:
            return tuple(self._calls)

    def heal(self) -> None:
        """From now on nothing goes wrong any more; what was late is done."""
        self.script = NoFaults()
        self._is_gone = False
        self._finish_late()

    @property
    def url(self) -> str:
        """The root of the store underneath."""
        return self.inner.url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` unless it exists, or fail on cue."""
        self._call("put_if_absent", path, lambda: self.inner.put_if_absent(path, data), size=len(data))

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write a large object, or fail on cue."""

        def tear() -> None:
            half = size // 2 // SECTION_MULTIPLE * SECTION_MULTIPLE or size // 2
            self.inner.put_unique(path, half, _first_bytes(sections, half))

        return self._call("put_unique", path, lambda: self.inner.put_unique(path, size, sections), size=size, tear=tear)

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path`` over, or fail on cue."""
        self._call("replace", path, lambda: self.inner.replace(path, data), size=len(data))

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content, or fail on cue."""
        return self._call("read", path, lambda: self.inner.read(path, max_bytes), spoil=_spoiled)

    def open(self, path: str) -> Source:
        """Open an object whose reads fail on cue, or fail on cue itself."""
        return self._call("open", path, lambda: _FaultySource(self, path, self.inner.open(path)))

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or fail on cue."""
        return self._call("stat", path, lambda: self.inner.stat(path))

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder`` at the time of the call, or fail on cue."""
        return self._call("list", folder, lambda: iter(tuple(self.inner.list(folder))))

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``, or fail on cue."""
        return self._call("folders", folder, lambda: iter(tuple(self.inner.folders(folder))))

    def delete(self, path: str) -> None:
        """Remove an object, or fail on cue."""
        self._call("delete", path, lambda: self.inner.delete(path))

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """Remove what killed writers left, if the store underneath can, or fail on cue."""
        inner = self.inner
        if not isinstance(inner, SupportsSweep):
            return 0
        return self._call("sweep", min((info.path for info in left), default=""), lambda: inner.sweep(left))

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """What the store underneath hides."""
        return self.inner.hidden(folder) if isinstance(self.inner, SupportsHidden) else iter(())

    def _call(
        self,
        operation: Operation,
        path: str,
        apply: Callable[[], T],
        *,
        size: int | None = None,
        tear: Callable[[], None] | None = None,
        spoil: Callable[[T, Fault], T] | None = None,
    ) -> T:
        self._finish_late()
        call = self._begin(operation, path, size)
        try:
            result = self._perform(call, apply, tear, spoil)
        except BaseException as error:
            self._update(call, outcome="refused" if isinstance(error, AlreadyExistsError) else "failed")
            raise
        self._update(call, outcome="done")
        return result

    def _begin(self, operation: Operation, path: str, size: int | None) -> Call:
        with self._lock:
            nth = self._counts.get((operation, path), 0)
            self._counts[operation, path] = nth + 1
            call = Call(len(self._calls), operation, path, nth, size)
            fault = self.script.fault(call)
            self._is_gone = self._is_gone or fault is Fault.GONE
            call = replace(call, fault=Fault.GONE if self._is_gone else fault)
            self._calls.append(call)
        return call

    def _perform(
        self,
        call: Call,
        apply: Callable[[], T],
        tear: Callable[[], None] | None,
        spoil: Callable[[T, Fault], T] | None,
    ) -> T:
        fault = _effective(call)
        if fault is Fault.DELAYED:
            self._sleep(self._delay)
        if fault in (None, Fault.DELAYED):
            return self._apply(call, apply)
        if fault in (Fault.SHORT, Fault.FLIPPED) and spoil is not None:
            return spoil(self._apply(call, apply), fault)
        if fault is Fault.TORN and tear is not None:
            self._apply(call, tear)
        if fault is Fault.LATE:
            with self._lock:
                self._late.append(lambda: self._apply(call, apply))
        if fault in (Fault.LOST_ANSWER, Fault.LOST_ANSWER_AS_REFUSAL):
            with contextlib.suppress(AlreadyExistsError):  # the answer that is lost may be a refusal too
                self._apply(call, apply)
        if fault is Fault.NO_MEMORY:
            raise MemoryError(f"scripted: no memory to call {call.operation} of {call.path}")
        raise _error(self._where(call), fault)

    def _apply(self, call: Call, apply: Callable[[], T]) -> T:
        result = apply()
        self._update(call, applied=True)
        return result

    def _finish_late(self) -> None:
        with self._lock:
            late, self._late = self._late, []
        for apply in late:
            with contextlib.suppress(AlreadyExistsError):  # somebody else was faster, and nobody waits for the answer
                apply()

    def _update(self, call: Call, *, applied: bool | None = None, outcome: Outcome | None = None) -> None:
        with self._lock:
            now = self._calls[call.index]
            self._calls[call.index] = replace(
                now,
                applied=now.applied if applied is None else applied,
                outcome=now.outcome if outcome is None else outcome,
            )

    def _where(self, call: Call) -> str:
        return f"{self.url}/{call.path}"


class _FaultySource:
    def __init__(self, store: FaultyStore, path: str, inner: Source) -> None:
        self._store = store
        self._path = path
        self._inner = inner

    @property
    def size(self) -> int:
        return self._inner.size

    def read_into(self, position: int, target: memoryview) -> None:
        def spoil(_: None, fault: Fault) -> None:
            if fault is Fault.SHORT:
                raise DamagedError(f"{self._store.url}/{self._path}", "scripted: ends too early")
            if target.nbytes:
                target.cast("B")[target.nbytes // 2] ^= 1

        self._store._call("read_into", self._path, lambda: self._inner.read_into(position, target), spoil=spoil)

    def close(self) -> None:
        self._inner.close()


def _spoiled(content: bytes, fault: Fault) -> bytes:
    half = len(content) // 2
    if fault is Fault.SHORT or not content:
        return content[:half]
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def _effective(call: Call) -> Fault | None:
    if call.fault in (None, Fault.NO_MEMORY) or call.fault in faults_of(call.operation):
        return call.fault
    return Fault.BEFORE


def _error(where: str, fault: Fault | None) -> StorageError:
    if fault is Fault.FULL:
        return StorageFullError(where, "scripted: no space left")
    if fault in (Fault.NO_ANSWER, Fault.LATE, Fault.LOST_ANSWER):
        return StoreOutcomeUnknownError(where, "scripted: no answer came")
    if fault in (Fault.LOST_ANSWER_AS_REFUSAL, Fault.REFUSED):
        return AlreadyExistsError(where, "scripted: exists already")
    return StorageError(where, "scripted: the call failed")


def _first_bytes(sections: Iterable[memoryview], count: int) -> Iterator[memoryview]:
    left = count
    for section in sections:
        piece = section.cast("B")[:left]
        left -= piece.nbytes
        yield piece
        if not left:
            return
