"""A server that takes so many requests a second, and clients that find out how many."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from distckpt.storage.remote.http import Endpoint, Outcome, Request

LIMIT, COUNT, THREADS = 150.0, 600, 16


class Limited(http.server.ThreadingHTTPServer):
    """Takes LIMIT requests a second, a few of them at once, and turns the others away."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.requests = 0
        self.tokens, self.filled = LIMIT / 10, time.monotonic()
        self.lock = threading.Lock()

    def takes(self) -> bool:
        """Whether there is room for one more."""
        with self.lock:
            now = time.monotonic()
            self.requests += 1
            self.tokens = min(LIMIT / 10, self.tokens + (now - self.filled) * LIMIT)
            self.filled = now
            if self.tokens < 1:
                return False
            self.tokens -= 1
            return True


class Answering(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Limited

    def do_GET(self) -> None:
        self.send_response(200 if self.server.takes() else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def limited() -> Iterator[Limited]:
    with Limited() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_what_would_be_turned_away_is_not_sent(limited: Limited) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{limited.server_port}")
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda _: endpoint.ask(Request("GET", "/")), range(COUNT)))
    assert all(answer.outcome is Outcome.DONE for answer in answers)
    assert COUNT < limited.requests <= 1.3 * COUNT
    endpoint.close()
