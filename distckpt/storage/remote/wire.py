"""A socket on which one exchange takes place, before one deadline."""

from __future__ import annotations

import io
import socket
import time
from typing import Any

Piece = bytes | memoryview

_SEND_BYTES = 1 << 20
_TOGETHER = 1 << 16
_BUFFER = 1 << 16


class Wire(io.RawIOBase):
    """A socket with one deadline for all that is done with it, as a file to read and as ``http.client`` wants sockets."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
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
                for first in range(0, piece.nbytes, _SEND_BYTES):
                    self._send(piece[first : first + _SEND_BYTES])
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
        count = self._sock.recv_into(buffer)
        self.received += count
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """A reader that takes what is asked for into the memory it is wanted in, and little beyond that."""
        return io.BufferedReader(self, _BUFFER)

    def _send(self, piece: memoryview) -> None:
        self._set_timeout()
        self._sock.sendall(piece)

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left)
