"""Questions to one server over HTTP: a deadline for every try, bodies from memory and into memory, no copies.

urllib3 opens the connections and ``http.client`` reads the answers. What lies between is here, because neither has a
deadline for a whole exchange, and urllib3's own ``readinto`` copies all that it reads.
"""

from __future__ import annotations

import enum
import http
import http.client
import json
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

from urllib3.exceptions import HTTPError

from distckpt.storage.remote.budget import bandwidths_of
from distckpt.storage.remote.connections import Connection, Connections
from distckpt.storage.remote.heads import head_of
from distckpt.storage.remote.throttle import Throttle
from distckpt.storage.remote.usual import Usual
from distckpt.storage.remote.wire import Piece, Wire

TIMEOUT = 30.0
"""Seconds for one try, without its bytes."""

SLOWEST = 256 << 10
"""Bytes a second at least: a try may take that much longer for what it carries."""

PATIENCE = 300.0
"""Seconds until a request that gets no answer is given up."""

READ_PATIENCE = 20.0
"""The same for what only reads."""

MOST = 1 << 20
"""The longest body that is taken into memory unasked."""

_READ_BYTES = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 16.0
_NOT_YET = {408, 409, 425, 429}
_NEVER = {501, 505}
_TOO_MANY = {429, 503}
_DAMAGE = re.compile(r"BadDigest|ChecksumMismatch|(CRC32C|MD5).*doesn't match", re.IGNORECASE | re.DOTALL)


DENIED = {401, 403}
"""Who asks may not have that: it is not known, or lacks the right."""


class Outcome(enum.Enum):
    """What a status says about the request that it answers."""

    DONE = "done"
    REFUSED = "refused"
    """For good: the same request would get the same answer."""
    UNKNOWN = "unknown"
    """It was not done, or not told; the same request may be done later. Has it anything to change, look first."""


def outcome(status: int) -> Outcome:
    """What to think of an answer. 412 counts as a refusal: who has set a condition asks for it himself."""
    if 200 <= status < 300:
        return Outcome.DONE
    if status in _NOT_YET or (status >= 500 and status not in _NEVER):
        return Outcome.UNKNOWN
    return Outcome.REFUSED


class NoAnswer(Exception):
    """No answer came, or not all of it: what was asked for may have been done.

    ``received`` says how much of the target has been filled. ``is_final`` if it would be the same next time.
    """

    def __init__(self, reason: str, *, received: int = 0, is_final: bool = False) -> None:
        super().__init__(reason)
        self.received = received
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. ``target`` is path and query, encoded already; ``body`` are pieces of memory that stay as they are.

    ``repeatable``: doing it twice is doing it once, so that it goes again at once if a kept connection turns out to be
    dead. Not so for what is done under a condition, where the second answer would be another one. ``bulk`` is what waits
    for its share of the bandwidth of the node, if that is limited; all else goes at once.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[Piece, ...] = ()
    repeatable: bool = True
    bulk: bool = False

    @property
    def nbytes(self) -> int:
        """The length of the body."""
        return sum(memoryview(piece).nbytes for piece in self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered. ``headers`` have small letters in their names; ``body`` is empty if it went into a target.

    ``received`` bytes of the body were taken, into the target or ``body``; it had more if ``is_cut``.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    received: int = 0
    is_cut: bool = False

    @property
    def outcome(self) -> Outcome:
        """What to think of it. What has come to the server damaged may go again."""
        if self.status == 400 and any(_DAMAGE.search(text) for text in self._complaint()):
            return Outcome.UNKNOWN
        return outcome(self.status)

    @property
    def code(self) -> str:
        """The server's own word for what is wrong, such as ``AccessDenied``, or ''."""
        return self._complaint()[0]

    @property
    def said(self) -> str:
        """Status, code and the beginning of the message, for people."""
        code, message = (_printable(text) for text in self._complaint())
        text = " ".join(filter(None, (f"HTTP {self.status}", code[:100])))
        return f"{text}: {message[:300].rstrip('. ')}" if message else text

    def _complaint(self) -> tuple[str, str]:
        """Code and message of an error as S3 (XML) and Google (JSON) write it, or the text itself."""
        text = self.body[:4096].decode(errors="replace").strip()
        if text.startswith("<"):
            code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
            return code[1] if code else "", message[1] if message else ""
        try:
            error = json.loads(self.body)["error"]
            reasons = [each["reason"] for each in error.get("errors", ())]
            return str(reasons[0] if reasons else ""), str(error["message"])
        except (ValueError, LookupError, TypeError, AttributeError):
            return "", " ".join(text.split())


def _printable(text: str) -> str:
    """What may go to a terminal, on one line."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


class Authority(Protocol):
    """Who lets requests pass for somebody with a name."""

    def headers(self, request: Request) -> Mapping[str, str]:
        """What to add to this try: a token, or a signature of all that is in the request.

        NoAnswer if credentials could not be got now; StorageError if there are none.
        """

    def renewed(self, answer: Answer) -> bool:
        """Whether ``answer`` complains of credentials that were too old, and there are newer ones now."""


class Anonymous:
    """For who needs no name."""

    def headers(self, request: Request) -> Mapping[str, str]:
        """None."""
        return {}

    def renewed(self, answer: Answer) -> bool:
        """Never."""
        return False


class Endpoint:
    """The server at ``url``. ``timeout`` and ``patience`` are seconds, see TIMEOUT and PATIENCE; for many threads.

    ``bandwidth`` is how many bytes a second the node may send, and how many receive; None for all it can. ``verify`` and
    ``client_cert`` as in Connections. Every target is below the path of ``url``, if that has one.
    """

    def __init__(
        self,
        url: str,
        authority: Authority | None = None,
        *,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        bandwidth: float | None = None,
        verify: bool | str = True,
        client_cert: str | tuple[str, str] | None = None,
    ) -> None:
        self._connections = Connections(url, verify=verify, client_cert=client_cert)
        self._authority = authority if authority is not None else Anonymous()
        self._timeout = timeout
        self._bandwidths = bandwidths_of(bandwidth)
        self.url = url.rstrip("/")
        self.patience = patience
        self.usual = Usual()
        self._throttle = Throttle()

    @property
    def host_header(self) -> str:
        """The ``Host`` of every request, as a signature has it."""
        return self._connections.host_header

    def once(
        self, request: Request, *, into: memoryview | None = None, most: int = MOST, seconds: float | None = None
    ) -> Answer:
        """The answer to one try, whatever it is; to another one if the credentials of the first were too old.

        The range that a 206 brings goes ``into`` memory if there is any given, every other body into ``Answer.body``; in
        both cases what is longer than that, or than ``most``, is left. NoAnswer if none has come before the deadline, which
        ``seconds`` puts earlier.
        """
        answer = self._try(request, into, most, seconds)
        if answer.status in (400, 401, 403) and self._authority.renewed(answer):
            answer = self._try(request, into, most, seconds)
        return answer

    def ask(self, request: Request, *, most: int = MOST, stop: threading.Event | None = None) -> Answer:
        """As ``once``, again and again until the outcome is known, patience is over, or ``stop`` set.

        For what is repeatable. At the end the last answer is returned, or NoAnswer raised. What only reads is tried for
        a few seconds here; whoever reads has patience of his own.
        """
        pauses = self.pauses(is_read=request.method in ("GET", "HEAD"), stop=stop)
        while True:
            try:
                answer = self.once(request, most=most)
            except NoAnswer as error:
                if error.is_final or not pauses.wait():
                    raise
            else:
                if answer.outcome is not Outcome.UNKNOWN or not pauses.wait(retry_after(answer)):
                    return answer

    def pauses(self, *, is_read: bool, stop: threading.Event | None = None) -> Pauses:
        """Those between the tries of one request."""
        return Pauses(min(self.patience, READ_PATIENCE) if is_read else self.patience, stop)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._connections.close()

    def _try(self, request: Request, into: memoryview | None, most: int, seconds: float | None) -> Answer:
        self._throttle.wait()
        answer = self._answer(request, into, most, seconds)
        if answer.status in _TOO_MANY:
            self._throttle.turned_away()
        else:
            self._throttle.taken()
        return answer

    def _answer(self, request: Request, into: memoryview | None, most: int, seconds: float | None) -> Answer:
        carried = request.nbytes + (into.nbytes if into is not None else 0)
        longest = self._timeout + carried / SLOWEST
        deadline = time.monotonic() + (longest if seconds is None else min(seconds, longest))
        headers = {**request.headers, **self._authority.headers(request)}
        head = self._head(request, headers)
        kept = self._connections.kept()
        if kept is not None:
            try:
                return self._exchange(kept, head, request, into, most, deadline)
            except _DeadConnection as error:
                if not request.repeatable:
                    raise NoAnswer(str(error)) from error
        try:
            connection = self._connections.opened(deadline)
        except (OSError, HTTPError) as error:
            reason = f"no connection to {self.url}: {_text(error)}"
            raise NoAnswer(reason, is_final=_is_of_certificate(error)) from error
        try:
            return self._exchange(connection, head, request, into, most, deadline)
        except _DeadConnection as error:
            raise NoAnswer(str(error)) from error

    def _head(self, request: Request, headers: Mapping[str, str]) -> bytes:
        fields = {
            "Host": self.host_header,
            "Accept-Encoding": "identity",
            **self._connections.forward_headers,
            **headers,
        }
        if request.body or request.method in ("PUT", "POST"):
            fields["Content-Length"] = str(request.nbytes)
        base = f"{self._connections.forwarded}{self._connections.base_path}"
        return head_of(request.method, request.target, base, fields)

    def _exchange(
        self,
        connection: Connection,
        head: bytes,
        request: Request,
        into: memoryview | None,
        most: int,
        deadline: float,
    ) -> Answer:
        """Ask on a connection, which goes back to the others if all was said, and is closed if not."""
        wire = Wire(cast("socket.socket", connection.sock), deadline, self._bandwidths, request.bulk)
        is_good = False
        reader: _Reader | None = None
        try:
            wire.send(head, request.body)
            reader = _Reader(wire, request.method)
            answer = reader.answer(into, most)
            is_good = not answer.is_cut and reader.can_go_on and not wire.is_broken
        except (OSError, http.client.HTTPException) as error:
            received = reader.received if reader is not None else 0
            if wire.received == 0 and not isinstance(error, TimeoutError):
                raise _DeadConnection(f"the connection ended before an answer: {_text(error)}") from error
            what = "in time" if isinstance(error, TimeoutError) else f"to its end: {_text(error)}"
            raise NoAnswer(f"no answer {what}, {wire.received} bytes of one had come", received=received) from error
        else:
            return answer
        finally:
            if reader is not None:
                reader.close()
            if is_good:
                self._connections.keep(connection)
            else:
                connection.close()


class Pauses:
    """What lies between one try and the next, until ``patience`` seconds are over or ``stop`` is set.

    Pauses grow, and differ by chance, so that many who were turned away do not come back together.
    """

    def __init__(self, patience: float, stop: threading.Event | None = None) -> None:
        self._end = time.monotonic() + patience
        self._longest = _FIRST_PAUSE
        self._stop = stop if stop is not None else threading.Event()

    def wait(self, at_least: float = 0.0) -> bool:
        """Wait, ``at_least`` as long as the server wants to be left alone.

        False at once if patience would be over, and as soon as ``stop`` is set.
        """
        seconds = max(random.uniform(self._longest / 2, self._longest), min(at_least, 2 * _LONGEST_PAUSE))
        if time.monotonic() + seconds > self._end:
            return False
        self._longest = min(2 * self._longest, _LONGEST_PAUSE)
        return not self._stop.wait(seconds)


def retry_after(answer: Answer) -> float:
    """How many seconds the server wants to be left alone."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0


class _DeadConnection(Exception):
    """Not a byte of an answer came, and none will."""


class _Reader:
    """Reads one answer."""

    def __init__(self, wire: Wire, method: str) -> None:
        self._response = http.client.HTTPResponse(cast("socket.socket", wire), method=method)
        self.received = 0

    @property
    def can_go_on(self) -> bool:
        """Whether the connection can carry another request, if all of the body was read."""
        return not self._response.will_close

    def answer(self, into: memoryview | None, most: int) -> Answer:
        """All of it, as far as there is room."""
        response = self._response
        response.begin()
        status, headers = response.status, {name.lower(): value for name, value in response.getheaders()}
        if into is not None and status == http.HTTPStatus.PARTIAL_CONTENT:
            self._fill(into.cast("B"))
            return Answer(status, headers, b"", self.received, self._has_more())
        body = bytearray()
        while len(body) < most and (piece := self._some(most - len(body))):
            body += piece
        return Answer(status, headers, bytes(body), len(body), self._has_more())

    def close(self) -> None:
        self._response.close()

    def _fill(self, target: memoryview) -> None:
        while self.received < target.nbytes:
            count = self._response.readinto(target[self.received : self.received + _READ_BYTES])
            self.received += count
            if not count:
                self._require_end()
                return

    def _some(self, most: int) -> bytes:
        piece = self._response.read1(min(most, _READ_BYTES))
        if not piece:
            self._require_end()
        return piece

    def _require_end(self) -> None:
        if self._response.length:
            raise http.client.IncompleteRead(b"", self._response.length)

    def _has_more(self) -> bool:
        """Whether there is more; reads on to the very end if there is not."""
        if self._response.length is not None and not self._response.chunked:
            return self._response.length > 0
        return bool(self._response.read1(1))


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_of_certificate(error: BaseException) -> bool:
    causes = [error, error.__cause__, error.__context__, *error.args]
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
