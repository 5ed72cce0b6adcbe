"""A server that speaks as much of Google's JSON API as one store asks for, and keeps sizes and what it is told of checksums.

A real one would be measured with us. Runs in a process of its own; round trips, speed of a connection and how many
requests a prefix takes are as told.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
SOURCE = "source"
"""An object that is there, of any length: whatever range is asked for comes."""

SOURCE_BYTES = 1 << 40
_PIECE = 1 << 18
_HEAD = 1 << 16
_WINDOW = 1 << 17
_NOW = "2026-01-01T00:00:00Z"


@dataclass
class Sink:
    """What has come; ``latency`` in seconds, ``rate`` in bytes a second and connection, ``limit`` in requests a second

    to names that begin with the same folder.
    """

    latency: float = 0.0
    rate: float = 0.0
    limit: float = 0.0
    objects: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: int = 0
    away: int = 0
    _tokens: dict[str, tuple[float, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _noise: bytes = field(default_factory=lambda: bytes(range(256)) * (_PIECE >> 8))

    def serve(self, connection: socket.socket) -> None:
        """Answer all that comes on one connection."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(_PIECE)
        with contextlib.suppress(OSError), connection:
            rest = b""
            while (asked := self._head(connection, rest)) is not None:
                head, rest = asked
                rest = self._exchange(connection, head, rest, buffer)

    def _head(self, connection: socket.socket, begun: bytes) -> tuple[bytes, bytes] | None:
        while b"\r\n\r\n" not in begun:
            piece = connection.recv(65536)
            if not piece:
                return None
            begun += piece
        head, _, rest = begun.partition(b"\r\n\r\n")
        return head, rest

    def _exchange(self, connection: socket.socket, head: bytes, rest: bytes, buffer: bytearray) -> bytes:
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        length = int(found[1]) if (found := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)) else 0
        began, body, rest = time.monotonic(), self._body(connection, length, rest[:length], buffer), rest[length:]
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        status, answer = self._answer(method, url.path, query, body, length)
        time.sleep(max(0.0, self.latency - (0 if length > _WINDOW else time.monotonic() - began)))
        if status == 206:
            wanted = re.search(rb"(?i)\r\nrange: *bytes=(\d+)-(\d+)", head)
            assert wanted is not None
            self._send_range(connection, int(wanted[1]), int(wanted[2]))
            return rest
        text = json.dumps(answer).encode()
        connection.sendall(f"HTTP/1.1 {status} -\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        return rest

    def _body(self, connection: socket.socket, length: int, begun: bytes, buffer: bytearray) -> bytes:
        """Take a body of which that much has come already; its beginning."""
        began, came, view = time.monotonic(), len(begun), memoryview(buffer)
        first = bytearray(begun[:_HEAD])
        while came < length:
            count = connection.recv_into(view[: min(length - came, _PIECE)])
            if not count:
                raise OSError("cut")
            came += count
            if len(first) < _HEAD:
                first += view[:count]
            if self.rate:
                time.sleep(max(0.0, began + came / self.rate - time.monotonic()))
        return bytes(first)

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes, length: int) -> tuple[int, Any]:
        if path == "/requests":
            return 200, {"requests": self.requests, "away": self.away, "objects": len(self.objects)}
        with self._lock:
            self.requests += 1
            if path.startswith("/bare"):
                return (206 if method == "GET" else 200), {}
            name = unquote(path.partition("/o/")[2])
            if self.limit and not self._has_token(_named(body) if path.startswith("/upload/") else name):
                self.away += 1
                return 503, {"error": {"message": "slow down"}}
            if path.startswith("/upload/"):
                boundary, _, _ = body.partition(b"\r\n")
                head, told, _ = body.split(b"\r\n\r\n", 2)
                told = told.rpartition(b"\r\n--")[0]
                size = length - body.index(b"\r\n\r\n", len(head) + 4 + len(told)) - 4 - len(boundary) - 6
                resource = json.loads(told)
                return self._create(resource["name"], size, resource["crc32c"], query)
            if name.endswith("/compose"):
                parts = [self.objects[part["name"]] for part in json.loads(body)["sourceObjects"]]
                return self._create(name.removesuffix("/compose"), sum(size for size, _ in parts), "", query)
            if method == "DELETE":
                return 204 if self.objects.pop(name, None) else 404, {}
            if name.rpartition("/")[2] == SOURCE:
                if "/download/" in path:
                    return 206, {}
                return 200, _resource(name, SOURCE_BYTES, "")
            if name in self.objects:
                return 200, _resource(name, *self.objects[name])
            return (404, {"error": {"message": "no such object"}}) if name else (200, {"items": []})

    def _create(self, name: str, size: int, crc: str, query: dict[str, str]) -> tuple[int, Any]:
        if query.get("ifGenerationMatch") == "0" and name in self.objects:
            return 412, {}
        self.objects[name] = (size, crc)
        return 200, _resource(name, size, crc)

    def _has_token(self, name: str) -> bool:
        prefix, now = name.partition("/")[0], time.monotonic()
        tokens, filled = self._tokens.get(prefix, (0.0, now))
        tokens = min(self.limit / 10, tokens + (now - filled) * self.limit)
        self._tokens[prefix] = tokens - (tokens >= 1), now
        return tokens >= 1

    def _send_range(self, connection: socket.socket, first: int, last: int) -> None:
        size = last - first + 1
        head = f"HTTP/1.1 206 -\r\nContent-Length: {size}\r\nContent-Range: bytes {first}-{last}/{SOURCE_BYTES}\r\n\r\n"
        connection.sendall(head.encode())
        began, sent, noise = time.monotonic(), 0, memoryview(self._noise)
        while sent < size:
            count = min(_PIECE if not self.rate else _PIECE // 4, size - sent)
            connection.sendall(noise[:count])
            sent += count
            if self.rate:
                time.sleep(max(0.0, began + sent / self.rate - time.monotonic()))


def _named(body: bytes) -> str:
    """The name of what is uploaded with that body."""
    found = re.search(rb'"name": *"([^"]*)"', body)
    assert found is not None
    return found[1].decode()


def _resource(name: str, size: int, crc: str) -> dict[str, Any]:
    return {"name": name, "size": str(size), "generation": "1", "updated": _NOW, **({"crc32c": crc} if crc else {})}


@dataclass(frozen=True)
class Running:
    """One that runs; ``certificate`` is what to verify it with, if it speaks TLS."""

    url: str
    certificate: str | None


@contextmanager
def running(latency: float = 0.0, rate: float = 0.0, limit: float = 0.0, *, tls: bool = False) -> Iterator[Running]:
    """Start one in a process of its own, and end it."""
    with tempfile.TemporaryDirectory(prefix="sink-") as folder:
        pem = _certificate(Path(folder)) if tls else None
        told = ["--latency", str(latency), "--rate", str(rate), "--limit", str(limit), *(["--pem", pem] if pem else [])]
        process = subprocess.Popen([sys.executable, __file__, *told], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield Running(f"{'https' if tls else 'http'}://127.0.0.1:{port}", pem)
        finally:
            process.kill()
            process.wait()


def _certificate(folder: Path) -> str:
    """A file with a key and a certificate of it for 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sink")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1))
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = made.add_extension(host, critical=False).sign(key, hashes.SHA256())
    path = folder / "sink.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return str(path)


def main() -> None:
    """Serve until killed; the port is printed first."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("latency", "rate", "limit"):
        parser.add_argument(f"--{option}", type=float, default=0.0)
    parser.add_argument("--pem")
    told = parser.parse_args()
    sink = Sink(told.latency, told.rate, told.limit)
    context = None
    if told.pem:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(told.pem)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    if told.rate:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        threading.Thread(target=sink.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
