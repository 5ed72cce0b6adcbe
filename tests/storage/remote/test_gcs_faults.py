"""GcsStore behind a network and a server that fail: what was said to be done is done, and nothing is done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import crc32c
import pytest
from google.oauth2.credentials import Credentials

from distckpt.errors import (
    AlreadyExistsError,
    DamagedError,
    StorageError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
)
from distckpt.storage import open_store, probe
from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.gcs import PARTS, GcsStore
from distckpt.storage.remote.gcs_options import open_gcs
from distckpt.storage.remote.http import Endpoint
from distckpt.testing.observing import MIB, MOST, pattern, sections_of
from tests.support.proxy import Answer, Cut, Fault, Flip, Late, Proxy, Reset, Stall, at, like
from tests.support.servers import Server
from tests.support.stores import GcsBucket

FAULTS = [
    *(Reset(), Reset(early=True), Reset(applied=True), Stall(), Stall(applied=True)),
    *(Answer(status, applied=applied) for status in (408, 409, 429, 500, 503) for applied in (False, True)),
    Answer(503, headers={"Retry-After": "0"}, early=True),
]
PART = 64 << 10
SIZE = 3 * PART + 17
IN_PARTS = 10
"""Requests for an object of SIZE: a look, four parts, putting them together, and their removal."""


@pytest.fixture
def proxy(fake_gcs: Server, bucket: str) -> Iterator[Proxy]:
    fake_gcs.make_bucket(bucket)
    with Proxy(fake_gcs.port) as proxy:
        yield proxy


@pytest.fixture
def outside(fake_gcs: Server, bucket: str, proxy: Proxy) -> GcsBucket:
    return GcsBucket(fake_gcs, bucket, "run")


def store_at(proxy: Proxy, bucket: str, patience: float = 20.0) -> GcsStore:
    endpoint = Endpoint(proxy.url, timeout=0.5, patience=patience)
    return GcsStore(endpoint, bucket, "run", Budget(4), part_bytes=PART)


@pytest.fixture
def store(proxy: Proxy, bucket: str) -> GcsStore:
    return store_at(proxy, bucket)


def named(fault: Fault) -> str:
    return repr(fault).replace("headers={}, ", "").replace("body=b'', ", "")


@pytest.mark.wide(2)
@pytest.mark.parametrize("fault", [*FAULTS, Answer(412, applied=True)], ids=named)
def test_who_creates_hears_of_it_whatever_becomes_of_the_answer(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, fault: Fault
) -> None:
    proxy.fail(fault, when=like("POST"))
    store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"ours"
    assert proxy.planned == 0
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"theirs")


@pytest.mark.wide(3)
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_who_lost_hears_of_it_whatever_becomes_of_the_answer(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, fault: Fault
) -> None:
    outside.write("log/1", b"theirs")
    proxy.fail(fault, when=like("POST"))
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"theirs"
    assert proxy.planned == 0


def test_it_exists_is_not_believed_where_nothing_is(store: GcsStore, proxy: Proxy, outside: GcsBucket) -> None:
    proxy.fail(Answer(412), when=like("POST"))
    store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"ours"


def test_what_cannot_be_read_back_is_neither_won_nor_lost(proxy: Proxy, bucket: str, outside: GcsBucket) -> None:
    store = store_at(proxy, bucket, patience=1.0)
    store.put_if_absent("log/0", b"")
    proxy.fail(Answer(503), times=10_000)
    with pytest.raises(StoreOutcomeUnknownError, match="503"):
        store.put_if_absent("log/1", b"ours")


def test_what_is_never_taken_is_unknown_in_the_end(proxy: Proxy, bucket: str, outside: GcsBucket) -> None:
    proxy.fail(Answer(503), when=like("POST"), times=10_000)
    with pytest.raises(StoreOutcomeUnknownError):
        store_at(proxy, bucket, patience=1.0).put_if_absent("log/1", b"ours")
    proxy.mend()
    assert outside.read("log/1") is None


def test_a_refusal_for_good_is_told_at_once_with_the_servers_words(store: GcsStore, proxy: Proxy) -> None:
    store.put_if_absent("log/0", b"")
    refusal = {"error": {"code": 403, "message": "no such right", "errors": [{"reason": "forbidden"}]}}
    for call in (
        lambda: store.put_if_absent("log/1", b"ours"),
        lambda: store.put_unique("a", 1, [memoryview(b"a")]),
        lambda: store.put_unique("a", SIZE, sections_of(pattern(SIZE), MIB)),
        lambda: store.replace("a", b"ours"),
        lambda: store.read("a", MOST),
        lambda: store.stat("a"),
        lambda: store.delete("a"),
        lambda: list(store.list("")),
    ):
        before = len(proxy.seen)
        proxy.fail(Answer(403, json.dumps(refusal).encode()))
        with pytest.raises(StorageError, match="HTTP 403 forbidden: no such right"):
            call()
        assert len(proxy.seen) == before + 1


def test_a_bucket_that_is_missing_is_no_empty_directory(proxy: Proxy) -> None:
    gone = {"error": {"code": 404, "message": "The specified bucket does not exist.", "errors": []}}
    store = store_at(proxy, "another-bucket")
    for call in (
        lambda: store.put_if_absent("log/1", b"ours"),
        lambda: store.read("a", MOST),
        lambda: store.stat("a"),
        lambda: list(store.list("")),
        lambda: list(store.folders("")),
    ):
        proxy.fail(Answer(404, json.dumps(gone).encode()))
        with pytest.raises(StorageError, match="bucket does not exist") as caught:
            call()
        assert type(caught.value) is StorageError


@pytest.mark.wide(2)
@pytest.mark.wide(3)
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_a_large_object_is_whole_and_alone_whichever_request_fails(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, fault: Fault
) -> None:
    data = pattern(SIZE)
    for number in range(IN_PARTS):
        proxy.fail(fault, when=at(len(proxy.seen) + number))
        info = store.put_unique(f"shard-{number}", SIZE, sections_of(data, MIB))
        assert info.size == SIZE
        assert outside.read(f"shard-{number}") == data
        assert proxy.planned == 0
    assert outside.names() == {f"shard-{number}" for number in range(IN_PARTS)}


@pytest.mark.parametrize("fault", FAULTS, ids=named)
@pytest.mark.parametrize("size", [0, 1000])
def test_a_small_object_is_there_once_whatever_becomes_of_the_answer(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, fault: Fault, size: int
) -> None:
    proxy.fail(fault)
    store.put_unique("shard", size, sections_of(pattern(size), MIB))
    assert outside.read("shard") == pattern(size)


def test_of_a_large_object_only_the_part_that_failed_goes_again(
    store: GcsStore, proxy: Proxy, outside: GcsBucket
) -> None:
    proxy.fail(Answer(503), when=at(2))
    store.put_unique("shard", SIZE, sections_of(pattern(SIZE), MIB))
    assert len(proxy.seen) == IN_PARTS + 2  # once in a process it is asked what kind of bucket it is


def test_a_part_that_arrived_damaged_goes_again(store: GcsStore, proxy: Proxy, outside: GcsBucket) -> None:
    proxy.fail(Flip(PART // 2, upload=True), when=at(2))
    store.put_unique("shard", SIZE, sections_of(pattern(SIZE), MIB))
    assert outside.read("shard") == pattern(SIZE)


class Torn(Exception):
    pass


@pytest.mark.parametrize("error", [Torn, KeyboardInterrupt])
def test_an_upload_that_is_interrupted_leaves_nothing(
    store: GcsStore, outside: GcsBucket, error: type[BaseException]
) -> None:
    def produce() -> Iterator[memoryview]:
        yield from list(sections_of(pattern(3 * MIB), MIB))[:2]
        raise error

    with pytest.raises(error):
        store.put_unique("shard", 3 * MIB, produce())
    assert outside.names() == set()


def test_a_failed_upload_leaves_nothing_and_says_why(store: GcsStore, proxy: Proxy, outside: GcsBucket) -> None:
    proxy.fail(Answer(400, b"nonsense"), when=at(3))
    with pytest.raises(StorageError, match="HTTP 400: nonsense"):
        store.put_unique("shard", SIZE, sections_of(pattern(SIZE), MIB))
    assert outside.names() == set()


def test_parts_are_hidden_and_those_of_killed_writers_are_swept(store: GcsStore, outside: GcsBucket) -> None:
    for name in (f"{PARTS}/dead-00", f"{PARTS}/dead-01", f"{PARTS}/other-00", "log/1"):
        outside.write(name, b"x")
    assert list(store.folders("")) == ["log"]
    assert list(store.list("")) == []
    left = list(store.hidden(""))
    assert sorted((info.path.rpartition("/")[2], info.size) for info in left) == [("dead", 2), ("other", 1)]
    outside.write(f"{PARTS}/other-01", b"x")  # somebody goes on
    assert store.sweep(left) == 1
    assert outside.names() == {f"{PARTS}/other-00", f"{PARTS}/other-01", "log/1"}
    assert store.sweep(list(store.hidden(""))) == 1
    assert outside.names() == {"log/1"}


@pytest.mark.wide(2)
@pytest.mark.parametrize("fault", [*FAULTS, Cut(2), Cut(0)], ids=named)
def test_reading_goes_on_whatever_becomes_of_an_answer(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, fault: Fault
) -> None:
    outside.write("folder/a", b"content")
    proxy.fail(fault)
    assert store.read("folder/a", MOST) == b"content"
    proxy.fail(fault)
    assert [info.size for info in store.list("folder")] == [7]
    proxy.fail(fault)
    assert list(store.folders("")) == ["folder"]
    proxy.fail(fault)
    source = store.open("folder/a")
    proxy.fail(fault)
    target = bytearray(4)
    source.read_into(2, memoryview(target))
    assert target == b"nten"
    assert proxy.planned == 0


def test_of_a_range_that_was_cut_off_only_the_rest_is_asked_for(
    store: GcsStore, proxy: Proxy, outside: GcsBucket
) -> None:
    data = pattern(2 * MIB)
    outside.write("a", data)
    source = store.open("a")
    proxy.fail(Cut(MIB))
    target = bytearray(MIB + MIB // 2)
    source.read_into(7, memoryview(target))
    assert target == data[7 : 7 + len(target)]
    ranges = [seen.headers["range"] for seen in proxy.seen if "range" in seen.headers]
    last = 7 + len(target) - 1
    assert ranges == [f"bytes=7-{last}", f"bytes={7 + MIB}-{last}"]


def test_a_straggler_is_asked_for_on_another_connection(proxy: Proxy, bucket: str, outside: GcsBucket) -> None:
    data = pattern(10_000)
    outside.write("a", data)
    source = GcsStore(Endpoint(proxy.url, timeout=1000), bucket, "run", Budget(4)).open("a")
    for number in range(10):
        if number == 9:
            proxy.fail(Stall())  # for longer than this test may take
        target = bytearray(1000)
        source.read_into(1000 * number, memoryview(target))
        assert target == data[1000 * number : 1000 * (number + 1)]
    assert [seen.headers["range"] for seen in proxy.seen[-2:]] == ["bytes=9000-9999"] * 2


def test_a_range_is_of_the_object_that_was_opened(store: GcsStore, outside: GcsBucket) -> None:
    outside.write("a", b"first")
    source = store.open("a")
    outside.write("a", b"other")
    target = bytearray(5)
    try:
        source.read_into(0, memoryview(target))
    except StorageError:
        return
    assert target == b"first"


def test_a_server_that_says_an_object_is_shorter_than_it_said_is_believed_in_the_end(
    store: GcsStore, proxy: Proxy, outside: GcsBucket
) -> None:
    outside.write("a", b"content")
    source = store.open("a")
    proxy.fail(Answer(416), times=10)
    with pytest.raises(DamagedError):
        source.read_into(0, memoryview(bytearray(7)))


def test_connections_that_died_meanwhile_cost_nothing(store: GcsStore, proxy: Proxy, outside: GcsBucket) -> None:
    store.put_if_absent("log/1", b"one")
    proxy.break_connections()
    store.put_if_absent("log/2", b"two")
    proxy.break_connections()
    assert store.read("log/2", MOST) == b"two"
    assert outside.names() == {"log/1", "log/2"}


def test_a_zonal_bucket_is_refused_for_what_must_be_created_once(store: GcsStore, proxy: Proxy, bucket: str) -> None:
    kind = json.dumps({"locationType": "zone", "storageClass": "RAPID"}).encode()
    proxy.fail(Answer(200, kind), when=like("GET", f"/b/{bucket}?"))
    with pytest.raises(StoreUnsuitableError, match="zonal"):
        store.put_if_absent("log/1", b"ours")
    size, before = 5 * PART + 17, len(proxy.seen)
    info = store.put_unique("shard", size, [memoryview(pattern(size))])
    assert (info.size, info.crc32c) == (size, crc32c.crc32c(pattern(size)))
    assert [each.method for each in proxy.seen[before:]] == ["POST"]  # nothing is put together there
    assert store.read("shard", size) == pattern(size)


def test_who_may_not_look_at_the_bucket_may_write_into_it(store: GcsStore, proxy: Proxy, bucket: str) -> None:
    proxy.fail(Answer(403), when=like("GET", f"/b/{bucket}?"))
    store.put_if_absent("log/1", b"ours")
    assert store.read("log/1", MOST) == b"ours"


def test_listings_go_on_page_by_page_as_far_as_they_are_wanted(store: GcsStore, proxy: Proxy, bucket: str) -> None:
    def page(*names: str, **more: str) -> Answer:
        items = [
            {"name": f"run/log/{name}", "size": "1", "updated": "2026-01-01T00:00:00.123456789Z"} for name in names
        ]
        return Answer(200, json.dumps({"items": items, **more}).encode())

    proxy.fail(page("1", "2", nextPageToken="a=b"))
    listing = store.list("log")
    assert next(listing).path == "log/1"
    assert len(proxy.seen) == 1
    proxy.fail(page("3"))
    rest = list(listing)
    assert [info.path for info in rest] == ["log/2", "log/3"]
    assert rest[0].modified == 1767225600.123456789
    assert "pageToken=a%3Db" in proxy.seen[1].target


def test_a_forked_child_opens_its_own_connections(store: GcsStore, proxy: Proxy, outside: GcsBucket) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.replace(f"parent-{number}", b"x"), range(8)))
    child = os.fork()
    if not child:
        status = 1
        try:
            store.put_unique("child", SIZE, sections_of(pattern(SIZE), MIB))
            store.put_if_absent("child-log", b"x")
            status = 0
        finally:
            os._exit(status)
    store.put_unique("parent", SIZE, sections_of(pattern(SIZE), MIB))
    assert os.waitpid(child, 0)[1] == 0
    assert outside.read("child") == outside.read("parent") == pattern(SIZE)


def test_a_token_that_the_server_does_not_know_any_more_is_renewed(proxy: Proxy, bucket: str) -> None:
    tokens = iter(["second", "third"])
    later = datetime(2100, 1, 1)
    token = Credentials("first", expiry=later, refresh_handler=lambda *_, **__: (next(tokens), later))
    store = open_gcs(f"gs://{bucket}/run", {"endpoint_url": proxy.url, "token": token, "timeout": 30, "patience": 30})
    store.put_if_absent("log/0", b"")
    proxy.fail(Answer(401), when=like("POST"))
    store.put_if_absent("log/1", b"ours")
    assert store.read("log/1", MOST) == b"ours"
    sent = [seen.headers["authorization"] for seen in proxy.seen if seen.method == "POST"]
    assert sent == ["Bearer first", "Bearer first", "Bearer second"]


def test_a_token_that_cannot_be_renewed_is_told_at_once(proxy: Proxy, bucket: str) -> None:
    store = open_gcs(f"gs://{bucket}/run", {"endpoint_url": proxy.url, "token": Credentials("only")})
    store.replace("a", b"")
    proxy.fail(Answer(401, b"expired"), times=10)
    with pytest.raises(StorageError, match=r"HTTP 401: expired.*token"):
        store.put_if_absent("log/1", b"ours")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"consistency": "md5"}, "no storage option consistency"), ({"requester_pays": True}, "project")],
)
def test_an_option_that_would_be_ignored_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_gcs("gs://bucket/run", options)


def test_credentials_that_are_none_are_told_as_such(proxy: Proxy, bucket: str) -> None:
    with pytest.raises(ValueError, match="token is a dict, which has to have"):
        open_gcs(f"gs://{bucket}/run", {"endpoint_url": proxy.url, "token": {"nonsense": 1}})
    store = open_gcs(f"gs://{bucket}/run", {"endpoint_url": proxy.url, "token": 17})
    with pytest.raises(StorageError, match="no credentials from the int in token"):
        store.read("a", MOST)


def test_who_pays_is_said_in_every_request(proxy: Proxy, bucket: str, outside: GcsBucket) -> None:
    options = {"endpoint_url": proxy.url, "token": "anon", "requester_pays": "my-project"}
    store = open_gcs(f"gs://{bucket}/run", options)
    store.put_if_absent("log/1", b"x")
    store.open("log/1").read_into(0, memoryview(bytearray(1)))
    assert list(store.list("log"))
    store.delete("log/1")
    assert all("userProject=my-project" in seen.target for seen in proxy.seen)
    assert len(proxy.seen) >= 5


def test_an_emulator_is_found_in_the_environment(
    proxy: Proxy, bucket: str, outside: GcsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url.removeprefix("http://"))
    open_gcs(f"gs://{bucket}/run", {}).replace("a", b"x")
    assert outside.read("a") == b"x"


@pytest.mark.parametrize(
    "answer",
    [
        {"itels": [{"name": "run/log/1", "size": "1", "updated": "2026-01-01T00:00:00Z"}]},
        {"items": [{"nale": "run/log/1", "size": "1", "updated": "2026-01-01T00:00:00Z"}]},
        {"items": [{"name": "rum/log/1", "size": "1", "updated": "2026-01-01T00:00:00Z"}]},
        {"items": [{"name": "run/log/1", "size": "x", "updated": "2026-01-01T00:00:00Z"}]},
        {"prefixes": ["run/lof/a/"]},
    ],
)
def test_a_listing_that_came_damaged_hides_nothing_and_is_asked_for_again(
    proxy: Proxy, bucket: str, outside: GcsBucket, answer: dict[str, object]
) -> None:
    outside.write("log/1", b"1")
    outside.write("log/a/1", b"1")
    options = {"endpoint_url": proxy.url, "token": "anon"}
    asked = like("GET", "fields=prefixes" if "prefixes" in answer else "fields=items")
    proxy.fail(Answer(200, json.dumps(answer).encode()), when=asked)
    with pytest.raises(StorageError):
        [*open_gcs(f"gs://{bucket}/run", options).list("log"), *open_gcs(f"gs://{bucket}/run", options).folders("log")]
    proxy.fail(Answer(200, json.dumps(answer).encode()), when=asked)
    patient = open_store(f"gs://{bucket}/run", options)
    assert [info.path for info in patient.list("log")] + list(patient.folders("log")) == ["log/1", "a"]


def test_a_probe_whose_first_request_comes_late_does_not_refuse_the_store(store: GcsStore, proxy: Proxy) -> None:
    proxy.fail(Late(1.0), when=like("POST", "ifGenerationMatch"))
    probe(store)


def test_what_arrived_damaged_is_not_taken_for_created(store: GcsStore, proxy: Proxy) -> None:
    proxy.fail(Flip(600, upload=True), when=like("POST", "ifGenerationMatch"))
    with pytest.raises(StorageError, match="they came there damaged"):
        store.put_if_absent("log/1", bytes(1000))


@pytest.mark.parametrize("body", [b'{"crc32c": "AAAAAA=="', b'{"crc32c": "AAAAAA=="}', b"{}"])
@pytest.mark.parametrize("size", [1000, SIZE])
def test_an_answer_that_came_damaged_does_not_fail_what_is_there(
    store: GcsStore, proxy: Proxy, outside: GcsBucket, body: bytes, size: int
) -> None:
    proxy.fail(Answer(200, body, applied=True), when=like("POST", "ifGenerationMatch"))
    store.put_if_absent("log/1", b"ours")
    assert outside.read("log/1") == b"ours"
    proxy.fail(Answer(200, body, applied=True), when=like("POST", "ifGenerationMatch"))
    info = store.put_unique("shard", size, sections_of(pattern(size), MIB))
    assert (outside.read("shard"), info.size) == (pattern(size), size)
