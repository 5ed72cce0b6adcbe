"""Objects in a bucket of S3, or of what speaks like it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import crc32c

from distckpt.errors import AccessDeniedError, AlreadyExistsError, DamagedError, ObjectNotFoundError, StorageError
from distckpt.storage.interface import ObjectInfo, Source, Store
from distckpt.storage.paths import folder_parts, object_parts
from distckpt.storage.remote import s3_answers as answers
from distckpt.storage.remote.budget import budget_of
from distckpt.storage.remote.creating import create, require_ours
from distckpt.storage.remote.http import DENIED, MOST, Answer, Endpoint, NoAnswer, Outcome, Request
from distckpt.storage.remote.parts import Part
from distckpt.storage.remote.ranges import RemoteSource
from distckpt.storage.remote.s3_bucket import S3Bucket
from distckpt.storage.remote.s3_options import S3Options, s3_options
from distckpt.storage.remote.s3_signing import SKEWED, STALE
from distckpt.storage.remote.s3_upload import S3Upload
from distckpt.storage.sections import checked

_PIECE = 8 << 20
_MOST_COPIED = 5 << 30
_ASK_CRC = {"x-amz-checksum-mode": "ENABLED"}
_ONLY_NEW = {"If-None-Match": "*"}


def open_s3(location: str, options: Mapping[str, Any]) -> S3Store:
    """The store of ``s3://bucket/folder``; options are those of ``s3_options``. Nothing is asked of anybody."""
    name, _, folder = location.partition("://")[2].partition("/")
    return S3Store(name, folder, s3_options(options))


class S3Store:
    """The objects of the bucket ``name`` below ``folder``; '' is all of it.

    An object of at most ``part_bytes`` is one request under the condition that the name is free, with its CRC32C. A
    larger one is a multipart upload, of which nothing is seen until all of it is there; as many parts at once as there
    may be connections. Nothing is cached. For many threads; a forked child opens its own connections.
    """

    def __init__(self, name: str, folder: str, options: S3Options, bucket: S3Bucket | None = None) -> None:
        self._url = f"s3://{name}/{folder}".rstrip("/")
        self._root = f"{folder}/" if folder else ""
        self._options = options
        self._bucket = bucket or S3Bucket(name, options)
        self._budget = budget_of(options.endpoint_url or "s3", options.connections)

    @property
    def url(self) -> str:
        """``s3://bucket/folder``."""
        return self._url

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` by one request under the condition that there is no such object.

        What came of it is known by reading back, whenever the answer is neither yes nor a refusal for good.
        """
        object_parts(path)

        def look() -> bool | None:
            answer = self._endpoint.once(self._request("GET", path), most=len(data) + 1)
            return None if self._is_missing(answer, path) else answer.body == data

        crc = crc32c.crc32c(data)
        request = self._put(path, (memoryview(data),), crc, _ONLY_NEW)
        answer = create(self._endpoint, request, look, self._full(path))
        if answer is not None and answers.info_of(path, len(data), answer.headers).crc32c not in (None, crc):
            require_ours(look, self._full(path))

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Create ``path``; the CRC32C is what the server says that it holds. AlreadyExistsError if it exists."""
        object_parts(path)
        pieces = checked(size, sections)
        if size <= self._options.part_bytes:
            whole = tuple(pieces)  # before there is room for the request: they may be read from the same server
            with self._budget.request():
                return self._put_whole(path, size, whole)
        if self.stat(path) is not None:
            raise AlreadyExistsError(self._full(path))
        upload = S3Upload(self._endpoint, self._budget, self._target(path), self._full(path))
        headers = {**self._options.write_headers, **self._payer}
        upload.put(size, pieces, self._options.part_bytes, headers, lambda crc: self._is_ours(path, size, crc))
        return self._stored(path)

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path``, over what may be there."""
        object_parts(path)
        self._done(self._ask(self._put(path, (memoryview(data),), crc32c.crc32c(data), {}), path), path)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``, or

        if its CRC32C is not the one that the server has.
        """
        object_parts(path)
        answer = self._ask(self._request("GET", path, _ASK_CRC), path, most=max_bytes + 1)
        if self._is_missing(answer, path):
            raise ObjectNotFoundError(self._full(path))
        size = len(answer.body)
        if size > max_bytes:
            long = answer.headers.get("content-length", f"more than {max_bytes}")
            raise DamagedError(self._full(path), f"is {long} bytes long, {max_bytes} are the most it may be")
        expected, found = answers.info_of(path, size, answer.headers).crc32c, crc32c.crc32c(answer.body)
        if expected not in (None, found):
            raise DamagedError(self._full(path), f"CRC32C is {found:08x}, the store says {expected:08x}")
        return answer.body

    def open(self, path: str) -> Source:
        """Open an object as it is now: what comes in its place later is not read. ObjectNotFoundError if there is none."""
        object_parts(path)
        answer = self._ask(self._request("HEAD", path), path)
        if self._is_missing(answer, path):
            raise ObjectNotFoundError(self._full(path))
        with self._understanding(path):
            size = answers.size_of(answer.headers)
        etag = answer.headers.get("etag")
        request = self._request("GET", path, {"If-Match": etag} if etag else {})
        return RemoteSource(self._endpoint, self._budget, request, size, self._full(path))

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None."""
        object_parts(path)
        return self._info(self._ask(self._request("HEAD", path, _ASK_CRC), path), path)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder``, page by page; without checksums, which S3 lists for none."""
        for page in self._pages(folder):
            yield from page.objects

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``, page by page."""
        for page in self._pages(folder):
            yield from page.folders

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is gone already."""
        object_parts(path)
        answer = self._ask(self._request("DELETE", path), path)
        if not (answer.status == 404 and answer.code != "NoSuchBucket"):
            self._done(answer, path)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """Abort these uploads, those that have had no new part since."""
        swept = 0
        for info in left:
            for upload in self._uploads(info.path):
                if self._info_of(upload) == info:
                    gone = self._is_missing(self._ask(Request("DELETE", _target_of(upload), dict(self._payer)), ""), "")
                    swept += not gone
        return swept

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """Uploads that are not finished, with the parts that have come."""
        if not folder_parts(folder):
            yield from (self._info_of(upload) for upload in self._uploads())

    def copy(self, source: Store | S3Store, source_path: str, path: str, size: int) -> ObjectInfo | None:
        """Have the server copy an object of at most 5 GiB from a bucket that is reached in the same way.

        See SupportsCopying.
        """
        object_parts(path)
        if not isinstance(source, S3Store) or size > _MOST_COPIED or not self._options.reaches_as(source._options):
            return None
        if self.stat(path) is not None:
            raise AlreadyExistsError(self._full(path))
        what = {"x-amz-copy-source": quote(f"{source._bucket.name}/{source._root}{source_path}")}
        headers = {**self._options.write_headers, **what, "x-amz-checksum-algorithm": "CRC32C"}
        with self._budget.request():
            answer = self._ask(self._request("PUT", path, headers), path)
        if self._is_missing(answer, path):
            raise ObjectNotFoundError(source._full(source_path))
        with self._understanding(path):
            answers.check_copied(answer.body)
        return self._stored(path)

    def sibling(self, folder: str) -> S3Store:
        """See SupportsSiblings."""
        return S3Store(self._bucket.name, folder, self._options, self._bucket)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _put_whole(self, path: str, size: int, pieces: Part) -> ObjectInfo:
        crc = 0
        for piece in pieces:
            crc = crc32c.crc32c(piece, crc)
        request = dataclasses.replace(self._put(path, pieces, crc, _ONLY_NEW), bulk=True)
        answer = create(self._endpoint, request, lambda: self._is_ours(path, size, crc), self._full(path))
        if answer is not None:
            info = answers.info_of(path, size, answer.headers)
            if info.crc32c is not None:
                return info
        return self._stored(path)

    def _put(self, path: str, pieces: Part, crc: int, condition: Mapping[str, str]) -> Request:
        # Both, as the libraries of Amazon send them: some servers look at the first only if they see the second.
        checksum = {"x-amz-checksum-crc32c": answers.crc_header(crc), "x-amz-sdk-checksum-algorithm": "CRC32C"}
        headers = {"Content-Type": "application/octet-stream", **self._options.write_headers, **checksum, **condition}
        return self._request("PUT", path, headers, pieces, repeatable=not condition)

    def _is_ours(self, path: str, size: int, crc: int) -> bool | None:
        """Whether what is there is this, or None if there is nothing."""
        info = self._info(self._endpoint.once(self._request("HEAD", path, _ASK_CRC)), path)
        if info is None or info.size != size:
            return None if info is None else False
        return (info.crc32c if info.crc32c is not None else self._sum(path)) == crc

    def _sum(self, path: str) -> int:
        """The CRC32C of an object of which the server has none, by reading it."""
        with contextlib.closing(self.open(path)) as source:
            crc, buffer = 0, memoryview(bytearray(min(_PIECE, source.size)))
            for position in range(0, source.size, _PIECE):
                piece = buffer[: min(_PIECE, source.size - position)]
                source.read_into(position, piece)
                crc = crc32c.crc32c(piece, crc)
        return crc

    def _stored(self, path: str) -> ObjectInfo:
        info = self.stat(path)
        if info is None:
            raise StorageError(self._full(path), "it was created and is gone already")
        return info

    # ---- requests ---------------------------------------------------------------------------------------------------

    @property
    def _endpoint(self) -> Endpoint:
        return self._bucket.endpoint()

    @property
    def _payer(self) -> Mapping[str, str]:
        return {"x-amz-request-payer": "requester"} if self._options.requester_pays else {}

    def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Part = (),
        *,
        repeatable: bool = True,
    ) -> Request:
        return Request(method, self._target(path), {**(headers or {}), **self._payer}, body, repeatable=repeatable)

    def _target(self, path: str) -> str:
        return f"/{quote(self._root + path)}"

    def _above(self, folder: str) -> str:
        return self._root + "".join(f"{part}/" for part in folder_parts(folder))

    def _pages(self, folder: str) -> Iterator[answers.Page]:
        above = self._above(folder)
        query = {"list-type": "2", "delimiter": "/", "encoding-type": "url", "prefix": above}
        following: str | None = ""
        while following is not None:
            answer = self._list({**query, **({"continuation-token": following} if following else {})}, folder)
            with self._understanding(folder):
                page = answers.page_of(answer.body, self._root, above)
            yield page
            following = page.following

    def _uploads(self, path: str = "") -> Iterator[answers.Upload]:
        """Every upload to what begins with ``path`` that nobody has finished."""
        query = {"uploads": "", "encoding-type": "url", "prefix": self._root + path}
        following: tuple[str, str] | None = ("", "")
        while following is not None:
            markers = {"key-marker": following[0], "upload-id-marker": following[1]}
            answer = self._list({**query, **{name: value for name, value in markers.items() if value}}, "")
            with self._understanding(""):
                page = answers.uploads_of(answer.body)
            yield from (upload for upload in page.uploads if upload.key.startswith(self._root))
            following = page.following

    def _info_of(self, upload: answers.Upload) -> ObjectInfo:
        """An upload as one object: as long as the parts that have come, and as old as the last of them."""
        size, touched = self._parts(upload)
        return ObjectInfo(upload.key.removeprefix(self._root), size, touched or upload.begun)

    def _parts(self, upload: answers.Upload) -> tuple[int, float]:
        """How many bytes of an upload have come, and when the last did by the server's clock; 0 if none has."""
        size, newest = 0, 0.0
        following: str | None = "0"
        while following is not None:
            target = f"{_target_of(upload)}&part-number-marker={quote(following, safe='')}"
            answer = self._ask(Request("GET", target, dict(self._payer)), "", most=answers.MOST_XML)
            if self._is_missing(answer, ""):
                return 0, 0.0
            with self._understanding(""):
                found, touched, following = answers.parts_of(answer.body)
            size, newest = size + found, max(newest, touched)
        return size, newest

    def _list(self, query: Mapping[str, str], folder: str) -> Answer:
        asked = "&".join(f"{name}={quote(value, safe='')}" for name, value in sorted(query.items()))
        request = Request("GET", f"/?{asked}", dict(self._payer))
        return self._done(self._ask(request, folder, most=answers.MOST_XML), folder)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def _ask(self, request: Request, path: str, *, most: int = MOST) -> Answer:
        try:
            return self._endpoint.ask(request, most=most)
        except NoAnswer as error:
            raise StorageError(self._full(path), str(error)) from error

    def _info(self, answer: Answer, path: str) -> ObjectInfo | None:
        if self._is_missing(answer, path):
            return None
        with self._understanding(path):
            return answers.info_of(path, answers.size_of(answer.headers), answer.headers)

    def _is_missing(self, answer: Answer, path: str) -> bool:
        """Whether there is no such object. StorageError if there is no such bucket, or for any other answer but that."""
        if answer.status == 404 and answer.code != "NoSuchBucket":
            return True
        self._done(answer, path)
        return False

    def _done(self, answer: Answer, path: str) -> Answer:
        if answer.outcome is Outcome.DONE:
            return answer
        kind = AccessDeniedError if answer.status in DENIED else StorageError
        raise kind(self._full(path), f"the store says {answer.said}{_advice(answer)}")

    @contextlib.contextmanager
    def _understanding(self, path: str) -> Iterator[None]:
        try:
            yield
        except (answers.NotUnderstood, ValueError, TypeError) as error:
            raise StorageError(self._full(path), f"the store at {self._endpoint.url} gave {error}") from error


_KEYS = ". Look at the options key, secret and profile, or at what botocore finds in the environment"
_RIGHTS = ". Who writes needs s3:PutObject, GetObject, DeleteObject, ListBucket and AbortMultipartUpload"


def _advice(answer: Answer) -> str:
    if answer.code in STALE:
        return ". These credentials have expired: get new ones, as by 'aws sso login' or the option token"
    if answer.code == SKEWED:
        return ". The clock of this host differs from the server's by too much: set it"
    return f"{_KEYS}{_RIGHTS}" if answer.status in DENIED else ""


def _target_of(upload: answers.Upload) -> str:
    return f"/{quote(upload.key)}?uploadId={quote(upload.upload_id, safe='')}"
