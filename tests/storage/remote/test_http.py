"""Requests over connections that are kept: deadlines, bounds, what is sent, and through whom."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from distckpt.storage.remote.budget import Bandwidth, Budget, bandwidths_of, share_of_node
from distckpt.storage.remote.http import Answer, Endpoint, NoAnswer, Outcome, Pauses, Request, outcome, retry_after
from distckpt.storage.remote.parts import parts_of, send_all
from distckpt.testing.observing import pattern

GET = Request("GET", "/a?b=c")


class Scripted:
    """Answers each connection's requests with the next of ``answers``, byte for byte; an empty one closes it.

    ``...`` after an answer goes on with its last byte for ever.
    """

    def __init__(self, *answers: bytes, context: ssl.SSLContext | None = None) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self._answers = list(answers)
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.clear()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            with contextlib.suppress(OSError), contextlib.ExitStack() as open_here:
                open_here.callback(client.close)
                if self._context is not None:
                    client = self._context.wrap_socket(client, server_side=True)
                    open_here.callback(client.close)
                self._converse(open_here.enter_context(client.makefile("rb")), client)

    def _converse(self, reader: object, client: socket.socket) -> None:
        while self._answers:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = reader.readline()
                if not line:
                    return
                head += line
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            self.heads.append(head)
            self.bodies.append(reader.read(int(length[0].split(b":")[1])) if length else b"")
            answer = self._answers.pop(0)
            client.sendall(answer.removesuffix(b"..."))
            while answer.endswith(b"..."):
                client.sendall(answer[-4:-3])
                threading.Event().wait(0.01)
            if not answer:
                return


def ok(body: bytes = b"", *fields: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def endpoint(server: Scripted, **more: float) -> Endpoint:
    return Endpoint(server.url, **{"timeout": 10.0, "patience": 10.0, **more})  # type: ignore[arg-type]


def test_one_connection_carries_many_requests() -> None:
    with Scripted(*[ok(b"%d" % number) for number in range(5)]) as server:
        asked = endpoint(server)
        assert [asked.once(GET).body for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert server.connections == 1
        asked.close()


def test_a_body_goes_as_it_is_from_all_its_pieces() -> None:
    data = pattern(3 << 20)
    with Scripted(ok(), ok()) as server:
        asked = endpoint(server)
        asked.once(Request("PUT", "/a", {"X-Own": "1"}, (b"head", memoryview(data), memoryview(data)[5:17], b"")))
        asked.once(Request("POST", "/a"))
        assert server.bodies == [b"head" + data + data[5:17], b""]
        assert b"X-Own: 1\r\n" in server.heads[0]
        assert b"Content-Length: 0\r\n" in server.heads[1]


def test_a_range_goes_into_the_memory_that_is_given() -> None:
    data = pattern(300_000)
    target = bytearray(300_000)
    with Scripted(ok(data, status="206 Partial Content"), ok(data)) as server:
        asked = endpoint(server)
        answer = asked.once(GET, into=memoryview(target))
        assert (answer.status, answer.received, answer.body) == (206, 300_000, b"")
        assert target == data
        answer = asked.once(GET, into=memoryview(target), most=10)
        assert (answer.status, answer.body, answer.is_cut) == (200, data[:10], True), "a 200 is no range"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_taken_up_to_a_bound_and_its_connection_is_not_used_again(chunked: bool) -> None:
    long = (
        ok(b"12345678")
        if not chunked
        else b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n0\r\n\r\n"
    )
    with Scripted(long, ok(b"next")) as server:
        asked = endpoint(server)
        assert asked.once(GET, most=8).body == b"12345678"
        assert asked.once(GET).body == b"next"
        assert server.connections == 1
    with Scripted(long, ok(b"next")) as server:
        asked = endpoint(server)
        answer = asked.once(GET, most=5)
        assert (answer.body, answer.is_cut) == (b"12345", True)
        assert asked.once(GET).body == b"next"
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nx...",
        b"HTTP/1.1 200 OK\r\nX-Endless: x...",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\nx...",
    ],
)
def test_a_deadline_holds_though_the_server_goes_on_talking(answer: bytes) -> None:
    with Scripted(answer) as server, pytest.raises(NoAnswer, match="in time"):
        endpoint(server, timeout=0.2).once(GET, most=1 << 20)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1234", b"nonsense\r\n\r\n"])
def test_what_is_no_whole_answer_is_none(answer: bytes) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listening.accept()
        client.recv(1 << 16)
        client.sendall(answer)
        client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(NoAnswer):
        Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=10).once(GET)
    thread.join()
    listening.close()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(NoAnswer, match="no connection") as caught:
        Endpoint(f"http://127.0.0.1:{port}", patience=0.01).ask(GET)
    assert not caught.value.is_final


def test_a_kept_connection_that_ends_costs_a_request_that_may_be_repeated_nothing() -> None:
    once = Request("POST", "/a", repeatable=False)
    with Scripted(ok(b"1"), b"", ok(b"2"), b"", ok(b"3")) as server:
        asked = endpoint(server)
        assert asked.once(GET).body == b"1"
        assert asked.once(GET).body == b"2"
        with pytest.raises(NoAnswer):
            asked.once(once)
        assert asked.once(once).body == b"3"


def test_the_same_is_asked_until_the_outcome_is_known() -> None:
    waits = ok(status="503 Slow down"), ok(status="429 Too many"), ok(b"5", status="408 Time-out")
    with Scripted(*waits, ok(status="404 None")) as server:
        assert endpoint(server).ask(GET).status == 404
    with Scripted(*waits) as server:
        assert endpoint(server, patience=0.0).ask(GET).status == 503


def test_one_who_has_stopped_does_not_ask_again() -> None:
    stop = threading.Event()
    stop.set()
    with Scripted(ok(status="503 Slow down")) as server:
        assert endpoint(server).ask(Request("PUT", "/a"), stop=stop).status == 503
    assert not Pauses(100.0, stop).wait()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, Outcome.DONE) for status in (200, 204, 206)),
        *((status, Outcome.REFUSED) for status in (301, 400, 401, 403, 404, 412, 416, 501)),
        *((status, Outcome.UNKNOWN) for status in (408, 409, 425, 429, 500, 502, 503, 504)),
    ],
)
def test_what_a_status_means(status: int, expected: Outcome) -> None:
    assert outcome(status) is expected


def test_what_came_damaged_to_the_server_may_go_again() -> None:
    xml = b"<?xml version='1.0'?><Error><Code>BadDigest</Code><Message>another digest</Message></Error>"
    google = (
        b'{"error": {"message": "Provided CRC32C \\"a\\" doesn\'t match calculated CRC32C \\"b\\".", "errors": []}}'
    )
    assert Answer(400, {}, xml).outcome is Outcome.UNKNOWN
    assert Answer(400, {}, google).outcome is Outcome.UNKNOWN
    assert Answer(400, {}, b"<Error><Code>InvalidArgument</Code></Error>").outcome is Outcome.REFUSED


def test_the_servers_own_words_are_found_in_both_languages() -> None:
    xml = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>not you</Message></Error>"
    google = b'{"error": {"message": "not you", "errors": [{"reason": "forbidden"}]}}'
    assert Answer(403, {}, xml).said == "HTTP 403 AccessDenied: not you"
    assert Answer(403, {}, google).said == "HTTP 403 forbidden: not you"
    assert Answer(502, {}, b"<html>Bad\n gateway").said == "HTTP 502"
    assert Answer(502, {}, b"Bad\n gateway").said == "HTTP 502: Bad gateway"
    assert Answer(503, {}, b'{"error": "text"}').said == 'HTTP 503: {"error": "text"}'
    assert Answer(403, {}, xml.replace(b"not you", b"Access Denied.")).said == "HTTP 403 AccessDenied: Access Denied"
    assert [retry_after(Answer(503, {"retry-after": text})) for text in ("7", "soon", "-1")] == [7.0, 0.0, 0.0]


def test_what_a_server_says_moves_nothing_on_a_terminal() -> None:
    assert Answer(418, {}, b"\x1b[31mtea\x07\npot\x1b]0;title\x08\x7f").said == "HTTP 418: [31mtea pot]0;title"
    xml = b"<Error><Code>No\x1b[2J</Code><Message>\xc2\x9bgone</Message></Error>"
    assert Answer(403, {}, xml).said == "HTTP 403 No[2J: gone"


@pytest.mark.parametrize(
    "request_", [Request("GET", "/a b"), Request("GET", "/a\r\nX: 1"), Request("GET", "/a", {"X": "1\r\nY: 2"})]
)
def test_nothing_is_smuggled_into_a_head(request_: Request) -> None:
    with Scripted(ok()) as server, pytest.raises(ValueError, match="not a request"):
        endpoint(server).once(request_)


@pytest.mark.parametrize("value", ["secret\n", "секрет"])
def test_a_header_that_cannot_be_sent_is_named_and_not_shown(value: str) -> None:
    request = Request("PUT", "/a", {"authorization": value})
    with (
        Scripted(ok()) as server,
        pytest.raises(ValueError, match=r"header 'authorization'.*look at the key") as caught,
    ):
        endpoint(server).once(request)
    assert value.strip() not in str(caught.value)


@pytest.mark.parametrize("url", ["gs://bucket", "example.org:80", "ftp://example.org", ""])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Endpoint(url)


def test_a_proxy_of_the_environment_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Scripted(ok(b"1"), ok(b"2")) as server:
        monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:secret@"))
        assert Endpoint("http://storage.example:8080/below", timeout=10).once(GET).body == b"1"
        assert Endpoint(server.url, timeout=10).once(GET).body == b"2", "not to this machine itself"
        first, second = server.heads
        assert first.startswith(
            b"GET http://storage.example:8080/below/a?b=c HTTP/1.1\r\nHost: storage.example:8080\r\n"
        )
        assert b"proxy-authorization: Basic dXNlcjpzZWNyZXQ=\r\n" in first
        assert second.startswith(b"GET /a?b=c HTTP/1.1\r\n")
        assert b"proxy-authorization" not in second


def test_a_secure_endpoint_is_reached_through_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Scripted(ok(status="403 Not there")) as server:
        monkeypatch.setenv("https_proxy", server.url)
        with pytest.raises(NoAnswer, match="403"):
            Endpoint("https://storage.example", timeout=10).once(GET)
        assert server.heads[0].startswith(b"CONNECT storage.example:443 HTTP/1.")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    start, end = datetime.datetime(2020, 1, 1), datetime.datetime(2100, 1, 1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(start).not_valid_after(end)
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = made.add_extension(own, critical=False).add_extension(x509.BasicConstraints(True, None), critical=True)
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    clear = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, clear)
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Scripted]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Scripted(ok(pattern(200_000), status="206 Partial Content"), ok(b"2"), context=context) as server:
        yield server


def test_a_stranger_is_not_spoken_to_and_is_one_for_good(secure: Scripted) -> None:
    with pytest.raises(NoAnswer, match="certificate") as caught:
        Endpoint(secure.url, timeout=10).ask(GET)
    assert caught.value.is_final


@pytest.mark.parametrize("how", ["option", "environment", "not at all"])
def test_whom_to_trust_is_told_by_option_or_environment(
    secure: Scripted, certificate: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    verify = {"option": str(certificate), "environment": True, "not at all": False}[how]
    asked = Endpoint(secure.url, timeout=10, verify=verify)
    target = bytearray(200_000)
    assert asked.once(GET, into=memoryview(target)).received == 200_000
    assert target == pattern(200_000)
    assert asked.once(Request("PUT", "/a", body=(memoryview(pattern(3 << 20)),))).body == b"2"
    assert secure.bodies[1] == pattern(3 << 20)
    assert secure.connections == 1


def test_a_node_shares_its_connections_among_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert share_of_node(32) == 32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (share_of_node(32), share_of_node(8), share_of_node(2)) == (8, 4, 2)


def test_data_has_its_share_of_the_bandwidth_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    bandwidth = Bandwidth(100)
    assert [round(bandwidth.count(50), 1) for _ in range(3)] == [1.9, 3.9, 5.9]
    assert bandwidths_of(100) is bandwidths_of(100.0)  # one for all stores of a process
    for wrong in (0, -1, True, "fast"):
        with pytest.raises(ValueError, match="bandwidth is a number of bytes a second"):
            bandwidths_of(wrong)


def test_a_request_of_data_waits_for_bandwidth_and_is_not_late_for_that_while_a_commit_goes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with Scripted(ok(), ok(), ok()) as server:
        rate = 1 << 17
        asked = endpoint(server, timeout=0.05, bandwidth=rate)
        body = pattern(1 << 17)
        assert (
            asked.once(Request("PUT", "/a", body=(body,), bulk=True)).status == 200
        )  # 0.9 s; without, late after 0.55
        assert bandwidths_of(rate)[0].count(1 << 22) > 30  # type: ignore[index]
        assert asked.once(Request("PUT", "/log", body=(b"an entry",))).status == 200
        assert server.bodies == [body, b"an entry"]
        asked.close()


def test_no_more_than_the_budget_are_under_way_and_a_child_has_its_own() -> None:
    budget = Budget(2)
    under_way, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2)

    def send(number: int, *_: object) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(10)
        with lock:
            under_way -= 1
        return number

    sent = send_all(parts_of([memoryview(bytes(8))], 1), send, budget)
    assert (sent, most) == (list(range(8)), 2)
    taken = [budget.take(), budget.take()]
    child = os.fork()
    if not child:
        budget.take()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for each in taken:
        each.release()


def test_after_a_failure_no_other_part_is_begun() -> None:
    begun = []

    def send(number: int, _: object, stop: threading.Event) -> None:
        begun.append(number)
        if number == 1:
            raise ValueError("the second one")
        stop.wait(10)

    with pytest.raises(ValueError, match="the second one"):
        send_all(parts_of([memoryview(bytes(100))], 1), send, Budget(3))
    assert {0, 1} <= set(begun) <= {0, 1, 2}


def test_parts_are_the_same_bytes_and_no_copies() -> None:
    data = pattern(1000)
    sections = [memoryview(data)[:300], memoryview(b""), memoryview(data)[300:310], memoryview(data)[310:]]
    for size in (1, 7, 299, 300, 301, 999, 1000, 5000):
        parts = list(parts_of(sections, size))
        assert b"".join(bytes(piece) for part in parts for piece in part) == data
        assert [sum(piece.nbytes for piece in part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        assert all(piece.obj is data for part in parts for piece in part)
