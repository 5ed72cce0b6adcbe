"""A proxy on loopback between a real client and a real server, which does to chosen requests what networks do.

    with Proxy(server.port) as proxy:
        proxy.fail(Reset(applied=True), when=like("PUT", "/run/log"))
        ...                                          # a client of proxy.url
        assert [each.served for each in proxy.seen] == [200, 412]

Plain HTTP/1.1, a thread a connection. Heads of answers name the proxy where they named the server.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

_PIECE = 1 << 18
_MAX_HEAD = 1 << 16
_NO_BODY = (204, 304)
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Reset:
    """The connection is reset: before the server has heard of the request, or once it has answered, if ``applied``.

    ``early``: before the body was taken, so that the client is still sending.
    """

    applied: bool = False
    early: bool = False


@dataclass(frozen=True)
class Stall:
    """No answer, ever; the connection stays open until the client gives it up."""

    applied: bool = False
    early: bool = False


@dataclass(frozen=True)
class Answer:
    """This answer, in place of the server's. If it is ``early`` the connection is closed after it, unread."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    applied: bool = False
    early: bool = False


@dataclass(frozen=True)
class Cut:
    """The body of the answer ends after ``keep`` bytes, as if that were all. If it is an ``upload``, it is the request's
    that the server gets no more of, and the client's connection is reset."""

    keep: int
    upload: bool = False


@dataclass(frozen=True)
class Flip:
    """One bit of the byte at ``position`` of the answer's body, or of the request's if it is an ``upload``."""

    position: int = 0
    upload: bool = False


@dataclass(frozen=True)
class Late:
    """The server gets the request ``seconds`` after the client has given it up, and does it then."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Twice:
    """The server gets the request twice, as from a proxy that was not sure of the first time; the second answer counts."""


Fault = Reset | Stall | Answer | Cut | Flip | Late | Twice


@dataclass
class Seen:
    """A request that came: the first has number 0. ``sent`` and ``received`` count bytes of bodies, on the client's side.

    ``status`` is what the client was told, and ``served`` what the server said; None if nothing.
    """

    number: int
    method: str
    target: str
    headers: Mapping[str, str]
    sent: int = 0
    received: int = 0
    status: int | None = None
    served: int | None = None


When = Callable[[Seen], bool]


def at(number: int) -> When:
    """The request of that number, counted from the start of the proxy."""
    return lambda seen: seen.number == number


def like(method: str, part: str = "") -> When:
    """Requests of that method with ``part`` in their target."""
    return lambda seen: seen.method == method and part in seen.target


def every(seen: Seen) -> bool:
    """Any request."""
    return True


class Proxy:
    """Listens at ``url`` and passes requests on to ``server``, a port here. Use as a context manager.

    ``latency`` is what a round trip takes in seconds, and ``rate`` how many bytes a second a connection carries in each
    direction. ``as_server`` has the server find its own name as the host, for one that serves by name and signs nothing.
    """

    def __init__(
        self, server: int, *, latency: float = 0.0, rate: float | None = None, as_server: bool = False
    ) -> None:
        self.seen: list[Seen] = []
        self._server, self._latency, self._rate, self._as_server = server, latency, rate, as_server
        self._planned: list[tuple[When, Fault]] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closing = False
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def fail(self, fault: Fault, *, when: When = every, times: int = 1) -> None:
        """The next ``times`` requests that are so get that fault. Of what was planned, the first that fits counts."""
        with self._lock:
            self._planned += [(when, fault)] * times

    @property
    def planned(self) -> int:
        """How many faults have not found their request yet."""
        with self._lock:
            return len(self._planned)

    def mend(self) -> None:
        """Forget every fault that is still planned."""
        with self._lock:
            self._planned.clear()

    def break_connections(self) -> None:
        """Reset every connection that is open now, as a restart of what is between would."""
        with self._lock:
            open_now = list(self._open)
        for each in open_now:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                _reset_when_closed(each)
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closing = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.break_connections()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the proxy is being closed
            while True:
                client, _ = self._listening.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                with self._lock:
                    if self._closing:
                        client.close()
                        return
                    self._threads = [each for each in self._threads if each.is_alive()] + [thread]
                    self._open.add(client)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as open_here, contextlib.suppress(OSError, _Over):
            open_here.callback(self._forget, client)
            time.sleep(self._latency)
            server = socket.create_connection(("127.0.0.1", self._server))
            open_here.callback(self._forget, server)
            with self._lock:
                self._open.add(server)
                if self._closing:
                    return
            link, upstream = _Link(client, self._rate), _Link(server, None)
            while self._exchange(link, upstream):
                pass

    def _forget(self, ending: socket.socket) -> None:
        with self._lock:
            self._open.discard(ending)
        ending.close()

    def _exchange(self, client: _Link, server: _Link) -> bool:
        """One request and its answer. Whether the connections can carry another."""
        head = client.head()
        if head is None:
            return False
        seen, fault = self._note(head)
        if isinstance(fault, Reset | Stall | Answer) and fault.early:
            return self._end(fault, client, seen)
        if isinstance(fault, Reset | Stall | Answer) and not fault.applied:
            if head.expects:
                client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            for piece, counts in client.body(head):
                seen.sent += len(piece) * counts
            return self._end(fault, client, seen)
        time.sleep(self._latency)
        early = None
        if isinstance(fault, Late | Twice):
            answer = self._keep_back(fault, head, client, server, seen)
        else:
            early = self._pass_on(head, client, server, seen, fault)
            answer = early or _final(server)
        seen.served = answer.status
        if isinstance(fault, Reset | Stall | Answer):
            for _ in server.body(answer, seen.method):
                pass
            return self._end(fault, client, seen) and not answer.closes
        seen.status = answer.status
        client.send(answer.raw.replace(self._named(self._server), self._named(self.port)))
        damage = fault if isinstance(fault, Cut | Flip) and not fault.upload else None
        for piece, counts in _damaged(server.body(answer, seen.method), damage):
            client.send(piece)
            seen.received += len(piece) * counts
        return not (head.closes or answer.closes or early)

    def _pass_on(self, head: _Head, client: _Link, server: _Link, seen: Seen, fault: Fault | None) -> _Head | None:
        """Give the server the request. What it answers if it does not wait for the body."""
        server.send(self._for_server(head))
        if head.expects:
            interim = server.head()
            if interim is None:
                raise _Over
            if interim.status != 100:
                return interim
            client.send(interim.raw)
        damage = fault if isinstance(fault, Cut | Flip) and fault.upload else None
        deaf = False
        if isinstance(damage, Cut):
            _reset_when_closed(client.socket)
        for piece, counts in _damaged(client.body(head), damage):
            seen.sent += len(piece) * counts
            try:
                if not deaf:
                    server.send(piece)
            except OSError:  # it has answered already, and the client is to hear that
                deaf = True
        return None

    def _keep_back(self, fault: Late | Twice, head: _Head, client: _Link, server: _Link, seen: Seen) -> _Head:
        """Take all of the request, and give it to the server when it is time to, as often as it is to have it."""
        if head.expects:
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = list(client.body(head))
        seen.sent += sum(len(piece) * counts for piece, counts in body)
        if isinstance(fault, Late):
            client.wait_for_the_end()
            time.sleep(fault.seconds)
        request = b"".join((self._for_server(head), *(piece for piece, _ in body)))
        server.send(request)
        if isinstance(fault, Twice):
            for _ in server.body(_final(server), seen.method):
                pass
            server.send(request)
        return _final(server)

    def _for_server(self, head: _Head) -> bytes:
        ours, theirs = self._named(self.port), self._named(self._server)
        return head.raw.replace(b": " + ours + b"\r\n", b": " + theirs + b"\r\n") if self._as_server else head.raw

    def _note(self, head: _Head) -> tuple[Seen, Fault | None]:
        method, target = head.first[:2]
        with self._lock:
            seen = Seen(len(self.seen), method, target, head.fields)
            self.seen.append(seen)
            for place, (when, fault) in enumerate(self._planned):
                if when(seen):
                    del self._planned[place]
                    return seen, fault
        return seen, None

    def _end(self, fault: Reset | Stall | Answer, client: _Link, seen: Seen) -> bool:
        if isinstance(fault, Reset):
            _reset_when_closed(client.socket)
            return False
        if isinstance(fault, Stall):
            client.wait_for_the_end()
            return False
        time.sleep(self._latency)
        fields = {**fault.headers, "Content-Length": str(len(fault.body))}
        if fault.early:
            fields["Connection"] = "close"
        lines = [f"HTTP/1.1 {fault.status} As planned", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        body = b"" if seen.method == "HEAD" else fault.body
        seen.status, seen.received = fault.status, len(body)
        client.send("\r\n".join(lines).encode() + body)
        if fault.early:
            client.socket.shutdown(socket.SHUT_WR)
            while client.some():
                pass
        return not fault.early

    @staticmethod
    def _named(port: int) -> bytes:
        return f"127.0.0.1:{port}".encode()


class _Over(Exception):
    """A connection ended in the middle."""


@dataclass(frozen=True)
class _Head:
    """The head of a request or of an answer."""

    raw: bytes
    first: tuple[str, ...]
    fields: Mapping[str, str]

    @property
    def status(self) -> int:
        return int(self.first[1])

    @property
    def expects(self) -> bool:
        return "100-continue" in self.fields.get("expect", "").lower()

    @property
    def closes(self) -> bool:
        said = self.fields.get("connection", "").lower()
        return "close" in said or (self.first[0] == "HTTP/1.0" and "keep-alive" not in said)


class _Link:
    """One end of a connection: heads and bodies, as they come."""

    def __init__(self, ending: socket.socket, rate: float | None) -> None:
        self.socket = ending
        self._rate = rate
        self._kept = b""
        self._free = {"in": 0.0, "out": 0.0}
        ending.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def head(self) -> _Head | None:
        """The next head, or None if the other side has closed."""
        while b"\r\n\r\n" not in self._kept:
            piece = self.socket.recv(_MAX_HEAD)
            if not piece and not self._kept:
                return None
            if not piece or len(self._kept) > _MAX_HEAD:
                raise _Over
            self._kept += piece
        raw, _, self._kept = self._kept.partition(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return _Head(raw + b"\r\n\r\n", tuple(first.split(" ", 2)), fields)

    def body(self, head: _Head, method: str = "") -> Iterator[tuple[bytes, bool]]:
        """The body in pieces, and of each whether it is content; of an answer if ``method`` says to what."""
        if method == "HEAD" or (method and (head.status in _NO_BODY)):
            return
        if "chunked" in head.fields.get("transfer-encoding", "").lower():
            yield from self._chunks()
        elif "content-length" in head.fields:
            yield from ((piece, True) for piece in self._exactly(int(head.fields["content-length"])))
        elif method:
            while piece := self.some():
                yield piece, True

    def some(self, most: int = _PIECE) -> bytes:
        """Some bytes; none at the end."""
        if not self._kept:
            self._kept = self.socket.recv(_PIECE)
        piece, self._kept = self._kept[:most], self._kept[most:]
        self._pace("in", len(piece))
        return piece

    def send(self, data: bytes) -> None:
        """All of it."""
        self._pace("out", len(data))
        self.socket.sendall(data)

    def wait_for_the_end(self) -> None:
        """Until the other side gives up; what it may still send is left where it is."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        poll.poll()

    def _exactly(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self.some(min(count, _PIECE))
            if not piece:
                raise _Over
            count -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[tuple[bytes, bool]]:
        while True:
            line = self._line()
            yield line, False
            size = int(line.split(b";")[0], 16)
            yield from ((piece, True) for piece in self._exactly(size))
            if size:
                yield self._line(), False
                continue
            while (line := self._line()) != b"\r\n":
                yield line, False
            yield line, False
            return

    def _line(self) -> bytes:
        while b"\r\n" not in self._kept:
            piece = self.socket.recv(_PIECE)
            if not piece:
                raise _Over
            self._kept += piece
        line, _, self._kept = self._kept.partition(b"\r\n")
        return line + b"\r\n"

    def _pace(self, way: str, count: int) -> None:
        if self._rate is not None and count:
            free = self._free[way] = max(self._free[way], time.monotonic()) + count / self._rate
            time.sleep(max(0.0, free - time.monotonic()))


def _final(server: _Link) -> _Head:
    while True:
        head = server.head()
        if head is None:
            raise _Over
        if head.status >= 200:
            return head


def _damaged(body: Iterator[tuple[bytes, bool]], damage: Cut | Flip | None) -> Iterator[tuple[bytes, bool]]:
    """The body with what is to be wrong with it."""
    done = 0
    for piece, counts in body:
        start, done = done, done + len(piece) * counts
        if isinstance(damage, Flip) and start <= damage.position < done:
            changed = bytearray(piece)
            changed[damage.position - start] ^= 1
            yield bytes(changed), counts
        elif isinstance(damage, Cut) and done > damage.keep:
            yield piece[: damage.keep - start], counts
            raise _Over
        else:
            yield piece, counts


def _reset_when_closed(ending: socket.socket) -> None:
    """Have the connection end as that of a dying host does."""
    ending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
