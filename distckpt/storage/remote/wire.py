"""A socket on which one exchange takes place, before one deadline."""

from __future__ import annotations

import io
import socket
import time
from typing import Any

from distckpt.storage.remote.budget import Bandwidth

Piece = bytes | memoryview

_SEND_BYTES = 1 << 20
_TOGETHER = 1 << 16
_BUFFER = 1 << 16
_PACED_BYTES = 1 << 18


class Wire(io.RawIOBase):
    """A socket with one deadline for all that is done with it, as a file to read and as ``http.client`` wants sockets.

    What goes over it counts for ``bandwidths``, up and down, if there are any. If it ``waits`` for them, the deadline is
    put off for as long.
    """

    def __init__(
        self,
        sock: socket.socket,
        deadline: float,
        bandwidths: tuple[Bandwidth, Bandwidth] | None = None,
        waits: bool = False,
    ) -> None:
        self._sock = sock
        self._deadline = deadline
        self._bandwidths = bandwidths
        self._waits = waits
        self._at_once = _PACED_BYTES if waits and bandwidths is not None else _SEND_BYTES
        self.received = 0
        self.is_broken = False

    def send(self, head: bytes, body: tuple[Piece, ...]) -> None:
        """All of a request. A server that ends it early may have answered: that is not raised here."""
        pieces = [memoryview(piece).cast("B") for piece in body]
        if sum(piece.nbytes for piece in pieces) <= _TOGETHER:
            head, pieces = b"".join((head, *pieces)), []
        try:
            self._send(memoryview(head))
            for piece in pieces:
                for first in range(0, piece.nbytes, self._at_once):
                    self._send(piece[first : first + self._at_once])
        except TimeoutError:
            raise
        except OSError:
            self.is_broken = True

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As much as is there, and something; 0 at the end."""
        self._set_timeout()
        count = self._sock.recv_into(buffer, min(len(buffer), self._at_once))
        self.received += count
        self._pace(1, count)
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """A reader that takes what is asked for into the memory it is wanted in, and little beyond that."""
        return io.BufferedReader(self, _BUFFER)

    def _send(self, piece: memoryview) -> None:
        self._pace(0, piece.nbytes)
        self._set_timeout()
        self._sock.sendall(piece)

    def _pace(self, way: int, nbytes: int) -> None:
        if self._bandwidths is not None:
            seconds = self._bandwidths[way].count(nbytes)
            if self._waits and seconds:
                time.sleep(seconds)
                self._deadline += seconds

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left)
