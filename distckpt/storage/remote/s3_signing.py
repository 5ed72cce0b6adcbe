"""Who we are for an S3, where a bucket is, and the signature under every request: botocore finds, we sign.

botocore's own signer knows no clock but this machine's, which may be wrong by more than S3 bears.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ConfigNotFound,
    ConfigParseError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.loaders import Loader, create_loader
from botocore.session import Session

from distckpt.errors import StorageError, StoreUnsuitableError
from distckpt.storage.remote.http import Answer, NoAnswer, Request
from distckpt.storage.remote.s3_options import S3Options

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
STALE = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
SKEWED = "RequestTimeTooSkewed"
_TOLERATED = 240.0
_JUST_NOW = 10.0
_FOR_GOOD = (ConfigNotFound, ConfigParseError, NoCredentialsError, PartialCredentialsError, ProfileNotFound)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Key, secret, and the token that comes with those that last for a while."""

    key: str
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where a bucket is: the URL to which keys are added, and the region for which requests are signed."""

    url: str
    region: str


def locate(name: str, options: S3Options, region: str | None = None) -> Bucket:
    """Where botocore says that the bucket is: endpoints, regions and styles as for anybody who uses it.

    Asks nobody. StoreUnsuitableError for a bucket that cannot be served, ValueError for options that botocore refuses.
    """
    if name.endswith("--x-s3"):
        raise StoreUnsuitableError(
            f"s3://{name}",
            "directory buckets of S3 Express want sessions of their own, which this release does not open",
        )
    found: list[str] = []

    def take(request: Any, **_: object) -> None:
        found.append(request.url)
        raise _Taken

    try:
        session = Session(profile=options.profile)
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        client = session.create_client(
            "s3",
            region_name=region or options.region,
            endpoint_url=options.endpoint_url,
            use_ssl=options.use_ssl,
            aws_access_key_id="nobody",  # or botocore would look for somebody, who is not needed here
            aws_secret_access_key="nothing",
            config=Config(**options.config, signature_version=UNSIGNED),
        )
        client.meta.events.register_first("before-send.s3.HeadBucket", take)
        with contextlib.suppress(_Taken):
            client.head_bucket(Bucket=name)
        signing = client.meta.region_name
    except (BotoCoreError, ValueError, TypeError) as error:
        raise ValueError(f"s3://{name}: botocore cannot say where that is: {error}") from error
    return Bucket(found[0].rstrip("/"), "us-east-1" if signing in (None, "aws-global") else signing)


@functools.cache
def _loader(data_path: str | None) -> Loader:
    """What botocore knows of S3: megabytes of JSON, which each session would read anew for a third of a second."""
    return create_loader(data_path)


class _Taken(Exception):
    """A request that was made for its URL, and is not sent."""


def certificates(options: S3Options) -> bool | str:
    """Those to trust: what was said, else what botocore finds (``AWS_CA_BUNDLE``), else those of the environment."""
    if options.verify is not None:
        return options.verify
    return Session(profile=options.profile).get_config_variable("ca_bundle") or True


def signed(
    request: Request, bucket: Bucket, credentials: Credentials, host: str, now: float, payload: str = UNSIGNED_PAYLOAD
) -> dict[str, str]:
    """The headers that AWS Signature Version 4 adds to the request, at ``now`` in epoch seconds.

    ``host`` is the header of that name, ``payload`` the SHA-256 of the body in hexadecimal or UNSIGNED_PAYLOAD. Signed
    are ``Host`` and what begins with ``x-amz-``.
    """
    stamp = datetime.fromtimestamp(now, timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    added = {"x-amz-content-sha256": payload, "x-amz-date": stamp}
    if credentials.token:
        added["x-amz-security-token"] = credentials.token
    ours = {name.lower(): value for name, value in request.headers.items() if name.lower().startswith("x-amz-")}
    headers = {**ours, **added, "host": host}
    names = ";".join(sorted(headers))
    target = urlsplit(f"{urlsplit(bucket.url).path}{request.target}")
    lines = [
        request.method,
        target.path,
        "&".join(sorted(target.query.split("&"))),
        *(f"{name}:{' '.join(headers[name].split())}" for name in sorted(headers)),
        "",
        names,
        payload,
    ]
    scope = f"{stamp[:8]}/{bucket.region}/s3/aws4_request"
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{credentials.secret}".encode()
    for part in scope.split("/"):
        key = _hmac(key, part)
    signature = _hmac(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}").hex()
    added["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return added


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


class S3Authority:
    """Signs every request to a bucket with what botocore finds. For many threads; a forked child looks for its own.

    Credentials that a server thinks too old are looked for anew; if it finds our clock wrong, its own counts from then
    on.
    """

    def __init__(self, bucket: Bucket, options: S3Options) -> None:
        self._bucket = bucket
        self._options = options
        self._host = _host_header(bucket.url)
        self._signs_payload = bool((options.config.get("s3") or {}).get("payload_signing_enabled"))
        self._ahead = 0.0
        self._begin()

    def headers(self, request: Request) -> Mapping[str, str]:
        """The signature, none for who is anonymous; see Authority for what is raised."""
        if self._options.anon:
            return {}
        payload = _digest(request) if self._signs_payload else UNSIGNED_PAYLOAD
        return signed(request, self._bucket, self._credentials(), self._host, time.time() + self._ahead, payload)

    def renewed(self, answer: Answer) -> bool:
        """Whether the server complains of old credentials or of our clock, and that is mended now.

        An answer to HEAD has no body that could say so: then both are looked at.
        """
        if self._options.anon:
            return False
        if answer.code == SKEWED or not answer.code:
            ahead = _server_ahead(answer)
            if abs(ahead - self._ahead) > _TOLERATED:
                self._ahead = ahead
                return True
        return (answer.code in STALE or not answer.code) and self._look_anew(sure=bool(answer.code))

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._looked_at = -_JUST_NOW

    def _credentials(self) -> Credentials:
        if self._pid != os.getpid():  # botocore's locks may have been held by a thread of the parent
            self._begin()
        with self._lock, _our_errors(self._bucket.url):
            if self._session is None:
                self._session = self._new_session()
            return _frozen(self._session)

    def _look_anew(self, *, sure: bool) -> bool:
        """Whether there are other credentials than before: a file or a role may have new ones."""
        if self._options.key:
            return False
        with self._lock, _our_errors(self._bucket.url):
            if time.monotonic() - self._looked_at < _JUST_NOW:
                return sure  # another thread has just done so
            before = _frozen(self._session) if self._session is not None else None
            self._session = self._new_session()
            self._looked_at = time.monotonic()
            return _frozen(self._session) != before

    def _new_session(self) -> Session:
        session = Session(profile=self._options.profile)
        if self._options.key:
            session.set_credentials(self._options.key, self._options.secret, self._options.token)
        return session


def _frozen(session: Session) -> Credentials:
    found: Any = session.get_credentials()
    if found is None:
        raise NoCredentialsError
    frozen = found.get_frozen_credentials()
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token)


@contextlib.contextmanager
def _our_errors(url: str) -> Iterator[None]:
    try:
        yield
    except NoCredentialsError as error:
        message = (
            "botocore finds no credentials: neither storage_options, environment, ~/.aws nor a role of this host has "
            "any. Pass anon=True for a bucket that everybody may use"
        )
        raise StorageError(url, message) from error
    except _FOR_GOOD as error:
        raise StorageError(url, f"botocore cannot use the credentials that it finds: {error}") from error
    except BotoCoreError as error:
        raise NoAnswer(f"no credentials now: {error}") from error


def _host_header(url: str) -> str:
    """As Connections has it."""
    parsed = urlsplit(url)
    host = parsed.hostname or ""
    default = parsed.port in (None, 443 if parsed.scheme == "https" else 80)
    return (f"[{host}]" if ":" in host else host) + ("" if default else f":{parsed.port}")


def _digest(request: Request) -> str:
    digest = hashlib.sha256()
    for piece in request.body:
        digest.update(piece)
    return digest.hexdigest()


def _server_ahead(answer: Answer) -> float:
    """By how many seconds the server's clock is ahead of ours; 0 if it does not say."""
    try:
        return parsedate_to_datetime(answer.headers.get("date", "")).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
