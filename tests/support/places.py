"""Directories in real object stores, and what is in them as other programs see it."""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from distckpt.storage import SupportsHidden, SupportsSweep, open_store
from tests.support import servers
from tests.support.proxy import Seen
from tests.support.stores import GcsBucket

if TYPE_CHECKING:
    from tests.support.s3_bucket import Bucket

FOLDER = "run"
_AT_ONCE = 4


class Objects(Protocol):
    """All that is in a bucket below a folder, by a way that does not lead through our stores."""

    def read(self, path: str) -> bytes | None:
        """The object's content, or None."""

    def write(self, path: str, data: bytes) -> None:
        """Put an object there."""


class Protocols(Protocol):
    """What has to be known of a protocol to attack a directory that is reached by it."""

    scheme: str
    elements: int
    """Of 8 bytes, so that a shard goes up in several parts."""
    damaged: Literal["refused", "told", "kept"]
    """What becomes of what comes to the server damaged: it is refused, or its other checksum told, or neither."""

    def serving(self) -> Any:
        """A context manager with a server."""

    def options(self, url: str) -> Mapping[str, Any]:
        """What a user would say to get to a server at that URL, with little patience and small parts."""

    def make_bucket(self, port: int, bucket: str) -> None:
        """A new one."""

    def objects(self, port: int, bucket: str) -> Objects:
        """What is in the directory."""

    def paths(self, port: int, bucket: str) -> set[str]:
        """Of all of its objects."""

    def hidden(self, port: int, bucket: str) -> set[str]:
        """What no listing of a directory shows: parts of objects that are not there."""

    def kind(self, seen: Seen) -> str:
        """What a request is for, in two words at most."""


class Gs:
    """Google Cloud Storage, on a fake-gcs-server. Unlike Google it keeps what comes to it damaged, and says so."""

    scheme = "gs"
    elements = 20_000
    damaged: Literal["refused", "told", "kept"] = "told"

    def serving(self) -> Any:
        """See Protocols."""
        return servers.fake_gcs()

    def options(self, url: str) -> Mapping[str, Any]:
        """See Protocols."""
        return {"endpoint_url": url, "token": "anon", "timeout": 2.5, "patience": 60, "part_size": 40_000}

    def make_bucket(self, port: int, bucket: str) -> None:
        """A new one."""
        servers.request(port, "POST", "/storage/v1/b?project=test", f'{{"name": "{bucket}"}}')

    def objects(self, port: int, bucket: str) -> GcsBucket:
        """See Protocols."""
        return GcsBucket(port, bucket, FOLDER)

    def paths(self, port: int, bucket: str) -> set[str]:
        """See Protocols."""
        return {path for path in self.objects(port, bucket).names() if not path.startswith(".parts/")}

    def hidden(self, port: int, bucket: str) -> set[str]:
        """See Protocols."""
        return {path for path in self.objects(port, bucket).names() if path.startswith(".parts/")}

    def kind(self, seen: Seen) -> str:
        """See Protocols."""
        path, _, query = seen.target.partition("?")
        if seen.method == "DELETE":
            return "delete"
        if path.endswith("/compose"):
            return "compose"
        if seen.method == "POST":
            return "create" if "ifGenerationMatch" in query else "write"
        if path.startswith("/download/"):
            return "range" if "range" in seen.headers else "read"
        if "prefix=" in query:
            return "list"
        return "look" if "/o/" in path else "bucket"


class S3:
    """S3, on a moto server. It keeps what comes to it damaged, whatever checksum came with it."""

    scheme = "s3"
    elements = 700_000
    damaged: Literal["refused", "told", "kept"] = "kept"

    def serving(self) -> Any:
        """See Protocols."""
        return servers.moto()

    def options(self, url: str) -> Mapping[str, Any]:
        """See Protocols."""
        who = {"key": servers.KEY, "secret": servers.SECRET}
        return {**who, "endpoint_url": url, "timeout": 3, "patience": 60, "part_size": 5 << 20}

    def make_bucket(self, port: int, bucket: str) -> None:
        """A new one."""
        self._bucket(port, bucket).client.create_bucket(Bucket=bucket)

    def objects(self, port: int, bucket: str) -> Objects:
        """See Protocols."""
        return self._bucket(port, bucket)

    def paths(self, port: int, bucket: str) -> set[str]:
        """See Protocols."""
        return {name.removeprefix(f"{FOLDER}/") for name in self._bucket(port, bucket).names()}

    def hidden(self, port: int, bucket: str) -> set[str]:
        """See Protocols."""
        return set(self._bucket(port, bucket).uploads())

    def kind(self, seen: Seen) -> str:
        """See Protocols."""
        query = seen.target.partition("?")[2]
        if seen.method == "POST":
            return "begin" if query.startswith("uploads") else "complete"
        if seen.method == "PUT":
            return "part" if "partNumber" in query else "create" if "if-none-match" in seen.headers else "write"
        if seen.method == "DELETE":
            return "abort" if "uploadId" in query else "delete"
        if "list-type" in query or re.match("uploads", query):
            return "list"
        if seen.method == "HEAD":
            return "look"
        return "range" if "range" in seen.headers else "read"

    @staticmethod
    @functools.cache
    def _bucket(port: int, bucket: str) -> Bucket:
        from tests.support.s3_bucket import Bucket

        return Bucket(port, bucket, FOLDER)


class S3Checked(S3):
    """S3, on a seaweedfs, which checks signatures and checksums."""

    damaged: Literal["refused", "told", "kept"] = "refused"

    def serving(self) -> Any:
        """See Protocols."""
        return servers.seaweedfs()


PROTOCOLS: Mapping[str, Protocols] = {"gs": Gs(), "s3": S3Checked(), "moto": S3()}


@dataclass(frozen=True)
class Place:
    """A directory in a bucket of its own, empty at first."""

    protocol: Protocols
    port: int
    bucket: str

    @classmethod
    def new(cls, protocol: Protocols, port: int) -> Place:
        """One that nobody else has, on the server at that port here."""
        bucket = f"bucket-{uuid.uuid4().hex}"
        protocol.make_bucket(port, bucket)
        return cls(protocol, port, bucket)

    @property
    def url(self) -> str:
        """What a manager is given for a directory."""
        return f"{self.protocol.scheme}://{self.bucket}/{FOLDER}"

    def options(self, through: str = "") -> Mapping[str, Any]:
        """The way to it, straight or through a proxy at that URL."""
        return self.protocol.options(through or f"http://127.0.0.1:{self.port}")

    def fill(self, folder: Path) -> None:
        """Put all files of a local folder there."""
        outside = self.protocol.objects(self.port, self.bucket)
        files = [file for file in folder.rglob("*") if file.is_file()]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: outside.write(file.relative_to(folder).as_posix(), file.read_bytes()), files))

    def copy_to(self, folder: Path) -> None:
        """Everything that is there as files of a local folder, fetched by another program than ours."""
        outside = self.protocol.objects(self.port, self.bucket)
        for path in self.protocol.paths(self.port, self.bucket):
            content = outside.read(path)
            if content is not None:  # else it has gone since the listing
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)

    def left_hidden(self) -> Iterator[str]:
        """Says what is still hidden after a sweep, if anything."""
        store = open_store(self.url, self.options())
        assert isinstance(store, SupportsSweep)
        assert isinstance(store, SupportsHidden)
        store.sweep(list(store.hidden("")))
        if hidden := self.protocol.hidden(self.port, self.bucket):
            yield f"a sweep leaves {sorted(hidden)}"
