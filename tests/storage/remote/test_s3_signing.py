"""Options as s3fs users know them, where a bucket is, and signatures, with botocore to compare."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as BotocoreCredentials

from distckpt.errors import StorageError, StoreUnsuitableError
from distckpt.storage import open_store
from distckpt.storage.remote.http import Request
from distckpt.storage.remote.s3 import open_s3
from distckpt.storage.remote.s3_options import s3_options
from distckpt.storage.remote.s3_signing import UNSIGNED_PAYLOAD, Bucket, Credentials, locate, signed
from tests.support.proxy import Answer, Proxy, like
from tests.support.s3_bucket import options_for
from tests.support.servers import Server


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("token", [None, "session-token"])
@pytest.mark.parametrize("payload", [UNSIGNED_PAYLOAD, "signed"])
@pytest.mark.parametrize(
    ("base", "target"),
    [
        ("https://bucket.s3.eu-west-1.amazonaws.com", "/run/a%20b%2Bc~%C3%A9"),
        ("http://127.0.0.1:9000/bucket", "/?list-type=2&prefix=a%2Fb&delimiter=%2F&encoding-type=url"),
        ("http://127.0.0.1:9000/bucket", "/key?uploads="),
        ("http://127.0.0.1:9000/bucket", "/key?partNumber=10&uploadId=a%2B%2F%3D"),
    ],
)
def test_a_signature_is_the_one_that_botocore_makes(base: str, target: str, payload: str, token: str | None) -> None:
    theirs = AWSRequest(
        "PUT", base + target, {"x-amz-checksum-crc32c": "AAAA AA==", "X-Amz-Acl": "  private  x "}, b"b"
    )
    theirs.context["client_config"] = Config(s3={"payload_signing_enabled": payload == "signed"})
    S3SigV4Auth(BotocoreCredentials("key", "secret", token), "s3", "eu-west-1").add_auth(theirs)
    stamp = datetime.datetime.strptime(theirs.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
    host = base.partition("://")[2].partition("/")[0]
    request = Request("PUT", target, {"x-amz-checksum-crc32c": "AAAA AA==", "X-Amz-Acl": "  private  x "})
    ours = signed(
        request,
        Bucket(base, "eu-west-1"),
        Credentials("key", "secret", token),
        host,
        stamp.replace(tzinfo=datetime.timezone.utc).timestamp(),
        theirs.headers["X-Amz-Content-SHA256"],
    )
    assert ours["authorization"] == theirs.headers["Authorization"]
    assert ours.get("x-amz-security-token") == token


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("bucket", {}, Bucket("https://bucket.s3.amazonaws.com", "us-east-1")),
        ("bucket", {"endpoint_url": "http://127.0.0.1:9000"}, Bucket("http://127.0.0.1:9000/bucket", "us-east-1")),
        (
            "bucket",
            {"client_kwargs": {"region_name": "eu-west-1"}},
            Bucket("https://bucket.s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ),
        (
            "bucket",
            {"endpoint_url": "https://minio.example", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            Bucket("https://bucket.minio.example", "us-east-1"),
        ),
        (
            "with.dots",
            {"client_kwargs": {"region_name": "eu-west-1"}},
            Bucket("https://s3.eu-west-1.amazonaws.com/with.dots", "eu-west-1"),
        ),
    ],
)
def test_a_bucket_is_where_botocore_says(name: str, given: dict[str, Any], expected: Bucket) -> None:
    assert locate(name, s3_options(given)) == expected


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"default_block_size": 1}, "default_block_size in storage_options"),
        ({"client_kwargs": {"config": 1}}, "config in client_kwargs"),
        ({"config_kwargs": {"read_timeout": 1}}, "read_timeout in config_kwargs"),
        ({"s3_additional_kwargs": {"SSECustomerKey": "x"}}, "SSECustomerKey in s3_additional_kwargs"),
        ({"config_kwargs": {"signature_version": "s3"}}, "s3v4"),
        ({"key": "k"}, "go together"),
        ({"timeout": 0}, "timeout is a number above 0"),
        ({"part_size": 1 << 20}, "at least 5 MiB"),
        ({"endpoint_url": "nonsense"}, "botocore cannot say"),
    ],
)
def test_options_that_would_be_ignored_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        open_store("s3://bucket/run", given)


def test_a_directory_bucket_is_refused() -> None:
    with pytest.raises(StoreUnsuitableError, match="S3 Express"):
        open_store("s3://bucket--usw2-az1--x-s3/run")


def test_who_has_no_credentials_is_told_where_they_were_looked_for() -> None:
    store = open_s3("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9", "patience": 0.1})
    with pytest.raises(StorageError, match=r"botocore finds no credentials.*anon=True"):
        store.put_if_absent("a", b"")


def test_what_users_say_is_in_the_requests(moto: Server, bucket: str) -> None:
    moto.make_bucket(bucket)
    more = {
        "requester_pays": True,
        "s3_additional_kwargs": {"ServerSideEncryption": "AES256", "BucketKeyEnabled": True},
    }
    with Proxy(moto.port) as proxy:
        store = open_s3(f"s3://{bucket}/run", options_for(proxy.url, **more))
        store.replace("a", b"1")
        assert store.read("a", 1) == b"1"
        assert {seen.headers["x-amz-request-payer"] for seen in proxy.seen} == {"requester"}
        assert [seen.headers.get("x-amz-server-side-encryption") for seen in proxy.seen] == ["AES256", None]
        assert proxy.seen[0].headers["x-amz-server-side-encryption-bucket-key-enabled"] == "true"


def test_who_is_anonymous_signs_nothing(moto: Server, bucket: str) -> None:
    moto.make_bucket(bucket)
    with Proxy(moto.port) as proxy:
        store = open_s3(f"s3://{bucket}/run", {"endpoint_url": proxy.url, "anon": True})
        store.replace("a", b"1")
        assert not any("authorization" in seen.headers for seen in proxy.seen)


@pytest.fixture
def amazon(moto: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """All that is asked of Amazon without TLS comes here."""
    with Proxy(moto.port) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield proxy


def test_amazon_is_asked_once_in_which_region_a_bucket_is(amazon: Proxy) -> None:
    amazon.fail(Answer(301, headers={"x-amz-bucket-region": "eu-central-1"}), when=like("HEAD"))
    amazon.fail(Answer(200), when=like("PUT"), times=2)
    store = open_s3("s3://bucket/run", {"key": "k", "secret": "s", "use_ssl": False})
    store.replace("a", b"1")
    store.replace("b", b"1")
    assert [(seen.method, seen.target) for seen in amazon.seen] == [
        ("HEAD", "http://bucket.s3.amazonaws.com/"),
        ("PUT", "http://bucket.s3.eu-central-1.amazonaws.com/run/a"),
        ("PUT", "http://bucket.s3.eu-central-1.amazonaws.com/run/b"),
    ]
    assert "/eu-central-1/s3/" in amazon.seen[1].headers["authorization"]
