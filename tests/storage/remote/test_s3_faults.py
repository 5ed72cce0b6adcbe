"""S3Store behind a network and a server that fail: what was said to be done is done, and nothing is done twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import crc32c
import pytest

from distckpt.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    StorageError,
    StoreOutcomeUnknownError,
)
from distckpt.storage import ObjectInfo
from distckpt.storage.remote.s3 import S3Store, open_s3
from distckpt.testing.observing import MIB, MOST, pattern, sections_of
from tests.support.proxy import Answer, Cut, Fault, Flip, Proxy, Reset, Seen, Stall, at, like
from tests.support.s3_bucket import Bucket, options_for
from tests.support.servers import Server

FAULTS = [
    *(Reset(), Reset(early=True), Reset(applied=True), Stall(), Stall(applied=True)),
    *(Answer(status, applied=applied) for status in (408, 409, 429, 500, 503) for applied in (False, True)),
    Answer(503, b"<Error><Code>SlowDown</Code></Error>", {"Retry-After": "0"}, early=True),
]
SIZE = 11 * MIB + 17
IN_PARTS = 7
"""Requests for an object of SIZE: a look, beginning, three parts, the end, and a look."""


def named(fault: Fault) -> str:
    return repr(fault).replace("headers={}, ", "").replace("body=b'', ", "")


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no such right</Message></Error>".encode()


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.port) as proxy:
        yield proxy


@pytest.fixture
def outside(moto: Server, bucket: str) -> Bucket:
    moto.make_bucket(bucket)
    return Bucket(moto, bucket, "run")


def store_at(proxy: Proxy, outside: Bucket, **more: Any) -> S3Store:
    return open_s3(f"s3://{outside.name}/run", {**options_for(proxy.url), "timeout": 3.0, **more})


@pytest.fixture
def store(proxy: Proxy, outside: Bucket) -> S3Store:
    return store_at(proxy, outside)


@pytest.mark.wide(2)
@pytest.mark.parametrize("fault", [*FAULTS, Answer(412, applied=True)], ids=named)
def test_who_creates_hears_of_it_whatever_becomes_of_the_answer(
    store: S3Store, proxy: Proxy, outside: Bucket, fault: Fault
) -> None:
    proxy.fail(fault, when=like("PUT"))
    store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"ours"
    assert proxy.planned == 0
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"theirs")


@pytest.mark.wide(3)
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_who_lost_hears_of_it_whatever_becomes_of_the_answer(
    store: S3Store, proxy: Proxy, outside: Bucket, fault: Fault
) -> None:
    outside.write("log/1", b"theirs")
    proxy.fail(fault, when=like("PUT"))
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"theirs"
    assert proxy.planned == 0


@pytest.mark.parametrize("status", [409, 412])
def test_it_exists_is_not_believed_where_nothing_is(store: S3Store, proxy: Proxy, outside: Bucket, status: int) -> None:
    proxy.fail(Answer(status), when=like("PUT"))
    store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"ours"


def test_what_cannot_be_read_back_is_neither_won_nor_lost(proxy: Proxy, outside: Bucket) -> None:
    proxy.fail(Answer(503), times=10_000)
    with pytest.raises(StoreOutcomeUnknownError, match="503"):
        store_at(proxy, outside, patience=1.0).put_if_absent("log/1", b"ours")


def test_a_refusal_after_an_answer_that_got_lost_says_nothing_of_what_was_sent_before(
    store: S3Store, proxy: Proxy
) -> None:
    """Nobody has created it as far as can be seen, and the first request may yet do so."""
    proxy.fail(Reset(), when=like("PUT"))
    proxy.fail(Answer(403, error("AccessDenied")), when=like("PUT"))
    with pytest.raises(StorageError, match="403 AccessDenied") as caught:
        store.put_if_absent("log/1", b"ours")
    assert not isinstance(caught.value, BlockedError)
    proxy.fail(Answer(403, error("AccessDenied")), when=like("PUT"))
    with pytest.raises(AccessDeniedError):
        store.put_if_absent("log/1", b"ours")


def test_a_refusal_for_good_is_told_at_once_with_the_servers_words(store: S3Store, proxy: Proxy) -> None:
    large = pattern(SIZE)
    for call in (
        lambda: store.put_if_absent("log/1", b"ours"),
        lambda: store.put_unique("a", 1, [memoryview(b"a")]),
        lambda: store.replace("a", b"ours"),
        lambda: store.read("a", MOST),
        lambda: store.delete("a"),
        lambda: list(store.list("")),
        lambda: list(store.folders("")),
        lambda: store.sweep([ObjectInfo("a", 1, 1.0)]),
    ):
        before = len(proxy.seen)
        proxy.fail(Answer(403, error("AccessDenied")))
        with pytest.raises(StorageError, match="403 AccessDenied: no such right"):
            call()
        assert len(proxy.seen) == before + 1
    for number in range(IN_PARTS - 1):
        before = len(proxy.seen)
        proxy.fail(Answer(403, error("AccessDenied")), when=at(before + number))
        with pytest.raises(StorageError, match="403"):
            store.put_unique(f"large/{number}", SIZE, sections_of(large, MIB))
        proxy.mend()


@pytest.mark.wide(3)
@pytest.mark.parametrize("number", range(IN_PARTS))
@pytest.mark.parametrize("fault", [Reset(), Reset(applied=True), Reset(early=True), Answer(503)], ids=named)
def test_a_large_object_arrives_whatever_goes_wrong_on_the_way(
    store: S3Store, proxy: Proxy, outside: Bucket, fault: Fault, number: int
) -> None:
    data = pattern(SIZE)
    proxy.fail(fault, when=at(number))
    info = store.put_unique("a/b", SIZE, sections_of(data, 2 * MIB))
    assert (info.size, info.crc32c) == (SIZE, crc32c.crc32c(data))
    assert outside.read("a/b") == data
    assert proxy.planned == 0
    with pytest.raises(AlreadyExistsError):
        store.put_unique("a/b", SIZE, sections_of(data, 2 * MIB))


@pytest.mark.parametrize("applied", [False, True])
def test_an_error_that_comes_after_200_is_an_error(
    store: S3Store, proxy: Proxy, outside: Bucket, applied: bool
) -> None:
    data = pattern(SIZE)
    proxy.fail(Answer(200, error("InternalError"), applied=applied), when=is_completion)
    store.put_unique("a/b", SIZE, sections_of(data, 2 * MIB))
    assert outside.read("a/b") == data


def test_what_is_given_up_leaves_nothing_hidden(proxy: Proxy, outside: Bucket) -> None:
    store = store_at(proxy, outside, patience=1.0)
    proxy.fail(Answer(503), when=like("PUT", "partNumber=2"), times=10_000)
    with pytest.raises(StorageError, match="503"):
        store.put_unique("a/b", SIZE, sections_of(pattern(SIZE), 2 * MIB))
    assert outside.uploads() == []
    assert outside.read("a/b") is None


def is_completion(seen: Seen) -> bool:
    return seen.method == "POST" and "uploadId" in seen.target


@pytest.mark.parametrize("fault", [Reset(), Reset(applied=True), Answer(503), Answer(500), Cut(7)], ids=named)
def test_what_is_read_arrives_whatever_goes_wrong_on_the_way(
    store: S3Store, proxy: Proxy, outside: Bucket, fault: Fault
) -> None:
    data = pattern(MIB + 11)
    outside.write("a", data)
    for call in (lambda: store.read("a", MOST), lambda: ranged(store), lambda: str(list(store.list("")))):
        expected = call()
        proxy.fail(fault, when=like("GET"))
        assert call() == expected
        assert proxy.planned == 0


def ranged(store: S3Store) -> bytes:
    target = bytearray(MIB)
    source = store.open("a")
    source.read_into(5, memoryview(target))
    source.close()
    return bytes(target)


def test_a_flipped_byte_is_damage(store: S3Store, proxy: Proxy) -> None:
    store.put_if_absent("a", pattern(4096))
    proxy.fail(Flip(100), when=like("GET"))
    with pytest.raises(DamagedError, match="CRC32C"):
        store.read("a", MOST)
    assert store.read("a", MOST) == pattern(4096)


def test_an_object_that_was_replaced_is_not_read_as_the_one_that_was_opened(store: S3Store, outside: Bucket) -> None:
    outside.write("a", b"first")
    source = store.open("a")
    outside.write("a", b"other")
    with pytest.raises(StorageError, match="412"):
        source.read_into(0, memoryview(bytearray(5)))
    source.close()


def test_a_server_whose_clock_is_another_is_followed(store: S3Store, proxy: Proxy, outside: Bucket) -> None:
    theirs = {"Date": "Tue, 01 Jan 2041 00:00:00 GMT"}
    proxy.fail(Answer(403, error("RequestTimeTooSkewed"), theirs))
    store.put_if_absent("log/1", b"ours")
    assert [seen.headers["x-amz-date"][:4] == "2041" for seen in proxy.seen] == [False, True]
    assert outside.read("log/1") == b"ours"


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (Answer(400, error("ExpiredToken")), r"no such right\. These credentials have expired"),
        (Answer(403, error("RequestTimeTooSkewed")), r"no such right\. The clock of this host differs"),
        (Answer(403, error("AccessDenied")), r"no such right\. Look at the options key.*needs s3:PutObject"),
        (Answer(200, b"<!DOCTYPE html>"), r"the store at http://127\.0\.0\.1:\d+/.* gave an HTML page"),
    ],
    ids=named,
)
def test_the_advice_is_for_what_is_wrong(store: S3Store, proxy: Proxy, answer: Answer, advice: str) -> None:
    proxy.fail(answer, times=2)
    with pytest.raises(StorageError, match=advice):
        list(store.list(""))


def test_credentials_that_have_expired_are_looked_for_anew(
    proxy: Proxy, outside: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_CREDENTIAL_EXPIRATION"):
        monkeypatch.delenv(name, raising=False)
    found = {"AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    options = {name: value for name, value in options_for(proxy.url).items() if name not in ("key", "secret")}
    store = open_s3(f"s3://{outside.name}/run", options)
    store.replace("a", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
    proxy.fail(Answer(400, error("ExpiredToken")))
    store.replace("a", b"2")
    assert [seen.headers["authorization"].split("=")[1].split("/")[0] for seen in proxy.seen] == ["old", "old", "new"]
    assert {seen.headers["x-amz-security-token"] for seen in proxy.seen} == {"token"}
    assert outside.read("a") == b"2"


def test_a_forked_child_opens_connections_of_its_own(store: S3Store, outside: Bucket) -> None:
    store.replace("a", b"parents")
    child = os.fork()
    if child == 0:
        failed = True
        try:
            store.replace("b", b"childs")
            failed = store.read("a", MOST) != b"parents"
        finally:
            os._exit(failed)
    for _ in range(5):
        assert store.read("a", MOST) == b"parents"
    assert os.waitpid(child, 0)[1] == 0
    assert outside.read("b") == b"childs"
