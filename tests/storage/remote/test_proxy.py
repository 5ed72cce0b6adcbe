"""The proxy between clients and servers: what passes, passes unchanged, and each fault is what it is called."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3
from urllib3.exceptions import HTTPError, IncompleteRead, ProtocolError

from tests.support.proxy import Answer, Cut, Flip, Late, Proxy, Reset, Stall, Twice, at, like
from tests.support.servers import Server

MIB = 1 << 20


class Client:
    """Objects of a bucket of a fake GCS: one try each, over a connection that is kept."""

    def __init__(self, url: str, bucket: str) -> None:
        self.url, self.bucket = url, bucket
        self.pool = urllib3.PoolManager(retries=False)

    def put(self, name: str, data: bytes, timeout: float = 30) -> int:
        target = f"{self.url}/upload/storage/v1/b/{self.bucket}/o?uploadType=media&name={name}"
        return self.pool.request("POST", target, body=data, timeout=timeout).status

    def get(self, name: str, timeout: float = 30) -> bytes | None:
        target = f"{self.url}/storage/v1/b/{self.bucket}/o/{name}?alt=media"
        answer = self.pool.request("GET", target, timeout=timeout)
        return answer.data if answer.status == 200 else None


def until(holds: Callable[[], bool]) -> None:
    """Wait for it; the test's time-out is the deadline."""
    while not holds():
        time.sleep(0.01)


@pytest.fixture
def proxy(fake_gcs: Server, bucket: str) -> Iterator[Proxy]:
    fake_gcs.make_bucket(bucket)
    with Proxy(fake_gcs.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy, bucket: str) -> Client:
    return Client(proxy.url, bucket)


@pytest.fixture
def direct(fake_gcs: Server, bucket: str) -> Client:
    return Client(fake_gcs.url, bucket)


def test_bodies_pass_unchanged_and_are_counted(proxy: Proxy, client: Client, direct: Client) -> None:
    data = bytes(range(256)) * 4096 * 3
    assert client.put("a", data) == 200
    assert direct.get("a") == data == client.get("a")
    assert client.get("none") is None
    assert [(each.method, each.sent, each.status, each.served) for each in proxy.seen] == [
        ("POST", len(data), 200, 200),
        ("GET", 0, 200, 200),
        ("GET", 0, 404, 404),
    ]
    assert proxy.seen[1].received == len(data)


def test_chunked_bodies_pass(client: Client, direct: Client) -> None:
    target = f"{client.url}/upload/storage/v1/b/{client.bucket}/o?uploadType=media&name=chunked"
    assert client.pool.request("POST", target, body=iter([b"one", b"two", b"x" * MIB])).status == 200
    assert direct.get("chunked") == b"onetwo" + b"x" * MIB


def test_the_server_is_asked_before_a_body_that_waits_for_it(client: Client, direct: Client, proxy: Proxy) -> None:
    target = f"/upload/storage/v1/b/{client.bucket}/o?uploadType=media&name=waiting"
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"12345")
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert direct.get("waiting") == b"12345"


def test_many_connections_at_once(client: Client, proxy: Proxy) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: client.put(f"{number}", bytes([number]) * 1000), range(64)))
        assert found == [200] * 64
        assert list(threads.map(lambda number: client.get(f"{number}"), range(64))) == [
            bytes([n]) * 1000 for n in range(64)
        ]
    assert sorted(each.number for each in proxy.seen) == list(range(128))


@pytest.mark.parametrize("early", [False, True])
def test_a_reset_before_the_server_has_heard_of_it(proxy: Proxy, client: Client, direct: Client, early: bool) -> None:
    proxy.fail(Reset(early=early))
    with pytest.raises(ProtocolError):
        client.put("a", bytes(MIB))
    assert direct.get("a") is None
    assert proxy.seen[0].served is None
    assert client.put("a", b"again") == 200


def test_an_answer_that_is_lost(proxy: Proxy, client: Client, direct: Client) -> None:
    proxy.fail(Reset(applied=True), when=at(1))
    assert client.put("a", b"first") == 200
    with pytest.raises(ProtocolError):
        client.put("b", b"second")
    assert direct.get("b") == b"second"
    assert (proxy.seen[1].status, proxy.seen[1].served) == (None, 200)


@pytest.mark.parametrize("fault", [Stall(), Stall(early=True), Stall(applied=True)])
def test_a_server_that_stalls(proxy: Proxy, client: Client, direct: Client, fault: Stall) -> None:
    proxy.fail(fault, when=like("POST", "name=a"))
    with pytest.raises(HTTPError):
        client.put("a", bytes(8 * MIB), timeout=0.5)
    until(lambda: not fault.applied or proxy.seen[0].served is not None)
    assert (direct.get("a") is not None) == fault.applied
    assert client.put("b", b"b") == 200


@pytest.mark.parametrize("fault", [Answer(503, b"slow down"), Answer(503, b"slow down", early=True), Answer(412, b"slow down",
    applied=True)])  # fmt: skip
def test_another_answer_than_the_servers(proxy: Proxy, client: Client, direct: Client, fault: Answer) -> None:
    proxy.fail(fault, times=2)
    assert [client.put("a", b"x"), client.put("a", b"x"), client.put("b", b"x")] == [fault.status, fault.status, 200]
    assert (direct.get("a") is not None) == fault.applied
    assert proxy.planned == 0


def test_a_request_that_is_done_when_nobody_waits_for_it_any_more(proxy: Proxy, client: Client, direct: Client) -> None:
    proxy.fail(Late())
    with pytest.raises(HTTPError):
        client.put("a", b"late", timeout=0.2)
    until(lambda: proxy.seen[0].served == 200)
    assert direct.get("a") == b"late"


def test_a_request_that_is_done_twice(proxy: Proxy, client: Client, direct: Client) -> None:
    direct.put("a", b"first")
    proxy.fail(Twice())
    answer = client.pool.request("DELETE", f"{client.url}/storage/v1/b/{client.bucket}/o/a")
    assert answer.status == 404, "it was gone the second time"
    assert client.put("b", bytes(MIB)) == 200
    assert client.get("b") == bytes(MIB)


def test_an_answer_that_is_cut(proxy: Proxy, client: Client, direct: Client) -> None:
    direct.put("a", bytes(MIB))
    proxy.fail(Cut(1000))
    with pytest.raises((IncompleteRead, ProtocolError)) as found:
        client.get("a")
    assert "1000" in str(found.value)
    assert client.get("a") == bytes(MIB)


def test_a_request_that_is_cut(proxy: Proxy, client: Client, direct: Client) -> None:
    proxy.fail(Cut(MIB, upload=True))
    with pytest.raises(ProtocolError):
        client.put("a", bytes(4 * MIB))
    assert proxy.seen[0].served is None


def test_a_flipped_bit_on_the_way_down_and_up(proxy: Proxy, client: Client, direct: Client) -> None:
    direct.put("a", bytes(MIB))
    proxy.fail(Flip(MIB - 1), when=like("GET"))
    assert client.get("a") == bytes(MIB - 1) + b"\1"
    proxy.fail(Flip(0, upload=True), when=like("POST"))
    client.put("b", bytes(MIB))
    assert direct.get("b") == b"\1" + bytes(MIB - 1)


def test_connections_that_break_are_made_anew(proxy: Proxy, client: Client) -> None:
    client.put("a", b"1")
    proxy.break_connections()
    assert client.get("a") == b"1"


def test_a_server_that_is_gone_is_a_connection_that_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy, pytest.raises(ProtocolError):
        Client(proxy.url, "b").get("a")


def test_closing_the_proxy_ends_stalls(fake_gcs: Server) -> None:
    with ThreadPoolExecutor(1) as threads:
        with Proxy(fake_gcs.port) as proxy:
            proxy.fail(Stall())
            waiting = threads.submit(Client(proxy.url, "b").get, "a")
            until(lambda: bool(proxy.seen))
        assert isinstance(waiting.exception(), ProtocolError)


def test_a_slow_line_carries_the_same(fake_gcs: Server, bucket: str) -> None:
    fake_gcs.make_bucket(bucket)
    with Proxy(fake_gcs.port, latency=0.001, rate=8 * MIB) as proxy:
        client = Client(proxy.url, bucket)
        assert client.put("a", bytes(MIB)) == 200
        assert client.get("a") == bytes(MIB)
