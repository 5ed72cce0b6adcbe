"""S3Store against real servers: the conformance kit, whole and in parts, and what only this store does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import crc32c
import pytest

from distckpt.errors import StorageError, StoreUnsuitableError
from distckpt.storage import open_store, probe
from distckpt.storage.interface import Store
from distckpt.storage.remote.s3 import S3Store, open_s3
from distckpt.testing import conformance
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import MIB, Outside, everything, pattern, sections_of
from tests.support.s3_bucket import Bucket, options_for
from tests.support.servers import PAGE_OF_MOTO, Server


class _OnServer(StoreConformance):
    folder = "runs/run 7+é"

    @pytest.fixture
    def server(self) -> Server:
        raise AssertionError("a subclass says which")

    @pytest.fixture
    def store(self, server: Server, bucket: str) -> Store:
        server.make_bucket(bucket)
        return open_s3(f"s3://{bucket}/{self.folder}".rstrip("/"), options_for(server.url))

    @pytest.fixture
    def outside(self, server: Server, bucket: str) -> Outside:
        return Bucket(server, bucket, self.folder)


@pytest.mark.wide(2)
class TestOnMoto(_OnServer):
    @pytest.fixture
    def server(self, moto: Server) -> Server:
        return moto


@pytest.mark.wide(4)
class TestOnMotoInTheRoot(TestOnMoto):
    folder = ""


class TestOnSeaweedfs(_OnServer):
    @pytest.fixture
    def server(self, seaweedfs: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
        monkeypatch.setattr(conformance, "ROUNDS", 1)  # of 16 writers; each takes this server 4 s
        return seaweedfs

    test_a_folder_goes_with_its_last_object = None  # a moment later: this server has folders of its own


def test_the_probe_refuses_a_server_that_ignores_conditions(rclone: Server, bucket: str) -> None:
    rclone.make_bucket(bucket)
    store = open_store(f"s3://{bucket}/run", options_for(rclone.url))
    with pytest.raises(StoreUnsuitableError, match="put-if-absent"):
        probe(store)


@pytest.fixture(params=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def outside(server: Server, bucket: str) -> Bucket:
    server.make_bucket(bucket)
    return Bucket(server, bucket, "run")


@pytest.fixture
def store(server: Server, outside: Bucket) -> S3Store:
    return open_s3(f"s3://{outside.name}/run", options_for(server.url))


def test_a_large_object_goes_in_parts_and_the_server_has_its_checksum(store: S3Store, outside: Bucket) -> None:
    data = pattern(17 * MIB + 5)
    info = store.put_unique("ckpt-1/e1/0.arrow", len(data), sections_of(data, 3 * MIB))
    assert (info.size, info.crc32c) == (len(data), crc32c.crc32c(data))
    assert outside.read("ckpt-1/e1/0.arrow") == data
    assert outside.uploads() == []
    head = outside.client.head_object(Bucket=outside.name, Key="run/ckpt-1/e1/0.arrow")
    assert head["ETag"].endswith('-4"'), "in four parts"


class _Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, _Interrupted])
def test_an_upload_that_its_producer_ends_leaves_nothing_hidden(
    store: S3Store, outside: Bucket, error: type[BaseException]
) -> None:
    data = pattern(17 * MIB)

    def produce() -> Iterator[memoryview]:
        yield from itertools.islice(sections_of(data, 5 * MIB), 2)
        raise error

    with pytest.raises(error):
        store.put_unique("large", len(data), produce())
    assert everything(store) == {}
    assert outside.uploads() == []


def test_an_upload_is_whole_whoever_lists_its_parts_meanwhile(store: S3Store, outside: Bucket) -> None:
    data = pattern(17 * MIB)
    with ThreadPoolExecutor(2) as pool:
        done = threading.Event()
        lookers = [pool.submit(lambda: [list(store.hidden("")) for _ in iter(done.is_set, True)]) for _ in range(2)]
        try:
            infos = [store.put_unique(f"{number}.arrow", len(data), sections_of(data, 5 * MIB)) for number in range(3)]
        finally:
            done.set()
    assert {info.crc32c for info in infos} == {crc32c.crc32c(data)}
    assert any(seen for looker in lookers for seen in looker.result()), "nobody saw one under way"
    assert outside.uploads() == []


def test_a_sweep_of_the_root_aborts_what_killed_writers_left_anywhere_below(store: S3Store, outside: Bucket) -> None:
    for key in ("run/ckpt-1/e1/0.arrow", "run/ckpt-1/e1/1.arrow", "run/2.arrow", "run-2/0.arrow"):
        upload = outside.client.create_multipart_upload(Bucket=outside.name, Key=key)["UploadId"]
        outside.client.upload_part(Bucket=outside.name, Key=key, UploadId=upload, PartNumber=7, Body=b"part")
    left = list(store.hidden(""))
    assert [(info.path, info.size) for info in left] == [
        ("ckpt-1/e1/0.arrow", 4),
        ("ckpt-1/e1/1.arrow", 4),
        ("2.arrow", 4),
    ]
    assert store.sweep([replace(info, modified=info.modified - 1) for info in left]) == 0, "somebody goes on"
    assert store.sweep(left) == 3
    assert outside.uploads() == ["run-2/0.arrow"]


def test_listings_have_many_pages(server: Server, store: S3Store, outside: Bucket) -> None:
    paths = [f"many/{number}" for number in range((PAGE_OF_MOTO if server.fixture == "moto" else 1000) + 5)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.replace(path, b"x"), paths))
    outside.write("many/", b"")
    assert {info.path for info in store.list("many")} == {*paths}


def test_a_bucket_that_is_not_there_is_named(moto: Server) -> None:
    store = open_s3("s3://no-such-bucket-here/run", options_for(moto.url))
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/run/log/1: .*NoSuchBucket"):
        store.put_if_absent("log/1", b"entry")
    with pytest.raises(StorageError, match=r"NoSuchBucket"):
        store.put_unique("large", 6 * MIB, sections_of(bytes(6 * MIB), MIB))
