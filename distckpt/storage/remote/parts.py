"""Parts of a large object, several on their way at once. They are views of the memory that they come from, no copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from distckpt.storage.remote.budget import Budget

Part = tuple[memoryview, ...]
_Sent = TypeVar("_Sent")


def parts_of(sections: Iterable[memoryview], part_bytes: int) -> Iterator[Part]:
    """The same bytes as parts of ``part_bytes`` each, but for the last. A section is asked for when it is needed."""
    pieces: list[memoryview] = []
    missing = part_bytes
    for section in sections:
        while section.nbytes:
            piece, section = section[:missing], section[missing:]
            pieces.append(piece)
            missing -= piece.nbytes
            if not missing:
                yield tuple(pieces)
                pieces, missing = [], part_bytes
    if pieces:
        yield tuple(pieces)


def send_all(parts: Iterable[Part], send: Callable[[int, Part, threading.Event], _Sent], budget: Budget) -> list[_Sent]:
    """What ``send`` returns for each part, in order; it gets the number, from 0, and the part.

    Parts are made in the calling thread while others are on their way. After the first failure, or if the making of
    parts fails or is interrupted, no other one is begun; the event that ``send`` gets is set, so that it can stop to
    try again; and when none is on its way any more the failure is raised.
    """
    stop = threading.Event()
    sending: list[_Sending[_Sent]] = []
    try:
        for number, part in enumerate(parts):
            free = budget.take()
            if stop.is_set():
                free.release()
                break
            sending.append(_Sending(partial(send, number, part, stop), free, stop))
        sent = [each.result() for each in sending]
    except BaseException:
        stop.set()
        raise
    finally:
        for each in sending:
            each.wait()
    return sent


class _Sending(Generic[_Sent]):
    """One part on its way, in a thread of its own."""

    def __init__(self, send: Callable[[], _Sent], free: threading.BoundedSemaphore, stop: threading.Event) -> None:
        self._send: Callable[[], _Sent] | None = send
        self._free = free
        self._stop = stop
        self._sent: list[_Sent] = []
        self._error: BaseException | None = None
        # A daemon, so that the interpreter does not wait for a store that hangs.
        self._thread: threading.Thread | None = threading.Thread(target=self._run, daemon=True, name="distckpt-part")
        try:
            self._thread.start()
        except RuntimeError:  # an interpreter that is shutting down starts no threads, but a save under way must end
            self._thread = None
            self._run()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> _Sent:
        self.wait()
        if self._error is not None:
            raise self._error
        return self._sent[0]

    def _run(self) -> None:
        send, self._send = self._send, None  # with it goes the part, whose memory somebody may be waiting for
        assert send is not None
        try:
            self._sent.append(send())
        except BaseException as error:  # noqa: BLE001  carried over to the thread that waits, which raises it
            self._error = error
            self._stop.set()
        finally:
            del send
            self._free.release()
