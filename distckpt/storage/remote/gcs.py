"""Objects in a bucket of Google Cloud Storage, by its JSON API."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import crc32c

from distckpt.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StoreUnsuitableError,
)
from distckpt.storage.interface import ObjectInfo, Source, Store
from distckpt.storage.paths import folder_parts, is_part, object_parts
from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.creating import create, require_ours
from distckpt.storage.remote.gcs_requests import (
    UPLOAD,
    Page,
    Requests,
    below,
    crc_of,
    crc_of_all,
    info_of,
    uploads,
)
from distckpt.storage.remote.http import DENIED, MOST, Answer, Endpoint, NoAnswer, Outcome, Request
from distckpt.storage.remote.parts import Part, parts_of, send_all
from distckpt.storage.remote.ranges import RemoteSource
from distckpt.storage.sections import checked

PARTS = ".parts"
"""Where parts of large objects lie until they are put together. A folder that no listing shows, in the root."""

PART_BYTES = 8 << 20
MOST_PARTS = 32
"""That Google puts together at once."""

_ADVICE = {
    401: ". Look at the option token, or at what gcsfs finds in the environment",
    403: ". Who writes needs storage.objects.create, get, list and delete, as in the role Storage Object User",
}
_PAGE_BYTES = 16 << 20
_OF_PAGE = {"kind", "items", "prefixes", "nextPageToken"}
_DAMAGED_TRIES = 3


class GcsStore:
    """The objects of ``bucket`` below ``folder`` ('' is all of it), at ``endpoint``; ``payer`` is a project or None.

    An object of at most two times ``part_bytes``, and any in a zonal bucket, is one request under the condition that the
    name is free. A larger one is sent in parts, as many at once as ``budget`` allows, which lie in a hidden folder until
    they are put together under that condition, and are deleted then. Nothing is cached. For many threads; a forked child
    opens its own connections.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        bucket: str,
        folder: str,
        budget: Budget,
        *,
        payer: str | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._endpoint = endpoint
        self._bucket = bucket
        self._prefix = f"{folder}/" if folder else ""
        self._budget = budget
        self._payer = payer
        self._requests = Requests(bucket, self._prefix, payer)
        self._part_bytes = part_bytes
        self._zonal: bool | None = None

    @property
    def url(self) -> str:
        """``gs://bucket/folder``."""
        return f"gs://{self._bucket}/{self._prefix}".rstrip("/")

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` by one request under the condition that there is no such object.

        What came of it is known by reading back, whenever the answer is neither yes nor a refusal for good.
        StoreUnsuitableError in a zonal bucket, where creating overwrites.
        """
        object_parts(path)
        if self._is_zonal():
            reason = "is a zonal bucket (Rapid Storage), in which creating an object may overwrite another one"
            advice = "A log needs a regional or multi-regional bucket; only shards may lie in a zonal one, by data=..."
            raise StoreUnsuitableError(self.url, f"{self._bucket} {reason}. {advice}")

        def look() -> bool | None:
            answer = self._endpoint.once(self._requests.get(path), most=len(data) + 1)
            return None if self._is_missing(answer, path) else answer.body == data

        crc = crc32c.crc32c(data)
        answer = create(self._endpoint, self._requests.insert(path, (data,), crc, absent=True), look, self._full(path))
        if answer is not None and not self._says(answer, crc):
            require_ours(look, self._full(path))

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Create ``path``; size and CRC32C are what the server says that it holds. AlreadyExistsError if it exists."""
        object_parts(path)
        pieces = checked(size, sections)
        if size <= 2 * self._part_bytes or self._is_zonal():  # which puts no parts together
            return self._put_whole(path, tuple(pieces))
        if self.stat(path) is not None:
            raise AlreadyExistsError(self._full(path))
        return self._put_in_parts(path, size, pieces)

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path``, over what may be there."""
        object_parts(path)
        self._done(self._ask(self._requests.insert(path, (data,), crc32c.crc32c(data), absent=False), path), path)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``."""
        object_parts(path)
        answer = self._found(self._ask(self._requests.get(path), path, most=max_bytes + 1), path)
        if len(answer.body) > max_bytes:
            size = answer.headers.get("content-length", f"more than {max_bytes}")
            raise DamagedError(self._full(path), f"is {size} bytes long, {max_bytes} are the most it may be")
        return answer.body

    def open(self, path: str) -> Source:
        """Open an object as it is now: what comes in its place later is not read. ObjectNotFoundError if there is none."""
        object_parts(path)
        resource = self._json(self._found(self._ask(self._requests.metadata(path), path), path), path)
        with self._understanding(path):
            request = self._requests.get(path, generation=str(int(resource["generation"])))
            size = int(resource["size"])
        return RemoteSource(self._endpoint, self._budget, request, size, self._full(path))

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None."""
        object_parts(path)
        answer = self._ask(self._requests.metadata(path), path)
        if self._is_missing(answer, path):
            return None
        return self._info(answer, path)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder``, page by page."""
        above = "/".join((*folder_parts(folder), ""))
        for page in self._pages(above, "items(name,size,crc32c,updated),nextPageToken"):
            for resource in page.items:
                with self._understanding(above):
                    path = below(resource["name"], self._prefix, above)
                    info = info_of(path, resource)
                if is_part(path.removeprefix(above)):
                    yield info

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``, page by page."""
        above = "/".join((*folder_parts(folder), ""))
        for page in self._pages(above, "prefixes,nextPageToken"):
            with self._understanding(above):
                paths = [below(prefix, self._prefix, above) for prefix in page.prefixes]
            yield from filter(is_part, (path.removeprefix(above).rstrip("/") for path in paths))

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is gone already."""
        object_parts(path)
        self._delete(self._prefix + path)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """Remove the parts of these uploads, those that have had no new part since."""
        swept = 0
        for info in left:
            parts = self._unfinished(f"{info.path}-").get(info, ())
            for name in parts:
                self._delete(name)
            swept += bool(parts)
        return swept

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """Parts that are not put together yet, by their uploads. They lie in the root alone."""
        if not folder_parts(folder):
            yield from self._unfinished(f"{PARTS}/")

    def _unfinished(self, above: str) -> Mapping[ObjectInfo, Sequence[str]]:
        with self._understanding(PARTS):
            return uploads(self._pages(above, "items(name,size,updated),nextPageToken"), self._prefix)

    def copy(self, source: Store | GcsStore, source_path: str, path: str, size: int) -> ObjectInfo | None:
        """Have Google copy an object of a bucket that is reached in the same way. See SupportsCopying."""
        object_parts(path)
        if not isinstance(source, GcsStore) or source._endpoint.url != self._endpoint.url:
            return None
        name, token = source._prefix + source_path, ""
        if self.stat(path) is not None:
            raise AlreadyExistsError(self._full(path))
        while True:
            with self._budget.request():
                answer = self._ask(self._requests.rewrite(name, source._bucket, path, token), path)
            if answer.status == 412:
                raise AlreadyExistsError(self._full(path))
            if self._is_missing(answer, path):
                raise ObjectNotFoundError(source._full(source_path))
            progress = self._json(answer, path)
            if progress.get("done"):
                return info_of(path, progress["resource"])
            token = str(progress["rewriteToken"])

    def sibling(self, folder: str) -> GcsStore:
        """See SupportsSiblings."""
        return GcsStore(
            self._endpoint, self._bucket, folder, self._budget, payer=self._payer, part_bytes=self._part_bytes
        )

    def _put_whole(self, path: str, pieces: Part) -> ObjectInfo:
        crc = crc_of_all(pieces)
        request = self._requests.insert(path, pieces, crc, absent=True, bulk=True)
        size = sum(piece.nbytes for piece in pieces)

        def look() -> bool | None:
            there = self._look(path)
            with self._understanding(path):
                return None if there is None else (int(there["size"]), crc_of(there)) == (size, crc)

        with self._budget.request():
            answer = create(self._endpoint, request, look, self._full(path))
        return self._created(path, answer)

    def _put_in_parts(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        upload = uuid.uuid4().hex
        part_bytes = max(self._part_bytes, -(-size // MOST_PARTS))
        names = [f"{PARTS}/{upload}-{number:02}" for number in range(-(-size // part_bytes))]

        def send(number: int, part: Part, stop: threading.Event) -> None:
            crc = crc_of_all(part)
            request = self._requests.insert(names[number], part, crc, absent=False, bulk=True)
            for _ in range(_DAMAGED_TRIES):
                answer = self._done(self._ask(request, path, stop=stop), path)
                if self._says(answer, crc):
                    return
            raise DamagedError(self._full(path), f"the store holds other bytes than were sent, {_DAMAGED_TRIES} times")

        def look() -> bool | None:
            there = self._look(path)
            return None if there is None else (there.get("metadata") or {}).get(UPLOAD) == upload

        try:
            send_all(parts_of(sections, part_bytes), send, self._budget)
            answer = create(self._endpoint, self._requests.compose(path, names, upload), look, self._full(path))
            return self._created(path, answer)
        finally:
            self._drop(names)

    def _drop(self, names: Sequence[str]) -> None:
        """Delete parts, as many as can be deleted now; sweep finds the others."""

        def drop(number: int, _: Part, stop: threading.Event) -> None:
            with contextlib.suppress(StorageError):
                self._delete(self._prefix + names[number], stop)

        send_all([()] * len(names), drop, self._budget)

    def _look(self, path: str) -> dict[str, Any] | None:
        answer = self._endpoint.once(self._requests.metadata(path))
        return None if self._is_missing(answer, path) else self._json(self._done(answer, path), path)

    def _created(self, path: str, answer: Answer | None) -> ObjectInfo:
        """What the server says of an object that it has just created; it is asked again if that answer got lost."""
        if answer is not None:
            with contextlib.suppress(StorageError):  # it came damaged
                return self._info(answer, path)
        info = self.stat(path)
        if info is None:
            raise StorageError(self._full(path), "it was created and is gone already")
        return info

    def _delete(self, name: str, stop: threading.Event | None = None) -> None:
        path = name.removeprefix(self._prefix)
        answer = self._ask(self._requests.delete(path), path, stop=stop)
        if not self._is_missing(answer, path):
            self._done(answer, path)

    def _pages(self, above: str, fields: str) -> Iterator[Page]:
        token: str | None = ""
        while token is not None:
            request = self._requests.page(above.lstrip("/"), fields, token)
            answer = self._done(self._ask(request, above, most=_PAGE_BYTES), above)
            found = self._json(answer, above)
            if not _OF_PAGE.issuperset(found):  # a listing has no checksum, and a damaged word in it would hide objects
                raise StorageError(
                    self._full(above), f"the store's listing has {sorted(found.keys() - _OF_PAGE)} in it"
                )
            yield Page(found.get("items", ()), found.get("prefixes", ()))
            token = found.get("nextPageToken")

    def _is_zonal(self) -> bool:
        """Whether the bucket has appendable objects alone (Rapid Storage). No, if who asks may not look at the bucket."""
        if self._zonal is None:
            answer = self._ask(self._requests.kind(), "")
            if answer.outcome is not Outcome.DONE and answer.status != 403:
                self._done(answer, "")
            bucket = self._json(answer, "") if answer.outcome is Outcome.DONE else {}
            self._zonal = bucket.get("locationType") == "zone" or bucket.get("storageClass") == "RAPID"
        return self._zonal

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _ask(self, request: Request, path: str, *, most: int = MOST, stop: threading.Event | None = None) -> Answer:
        try:
            return self._endpoint.ask(request, most=most, stop=stop)
        except NoAnswer as error:
            raise StorageError(self._full(path), str(error)) from error

    def _is_missing(self, answer: Answer, path: str) -> bool:
        """Whether there is no such object. StorageError if there is no such bucket, or for any other answer but that."""
        if answer.status == 404 and "bucket" not in answer.said.lower().partition("object")[0]:
            return True
        self._done(answer, path)
        return False

    def _found(self, answer: Answer, path: str) -> Answer:
        if self._is_missing(answer, path):
            raise ObjectNotFoundError(self._full(path))
        return answer

    def _done(self, answer: Answer, path: str) -> Answer:
        if answer.outcome is Outcome.DONE:
            return answer
        advice = _ADVICE.get(answer.status, "")
        kind = AccessDeniedError if answer.status in DENIED else StorageError
        raise kind(self._full(path), f"the store says {answer.said}{advice}")

    def _says(self, answer: Answer, crc: int) -> bool:
        """Whether the server says that it holds bytes of that CRC32C, or says nothing of it."""
        with contextlib.suppress(StorageError), self._understanding(""):
            return crc_of(self._json(answer, "")) in (None, crc)
        return False

    def _info(self, answer: Answer, path: str) -> ObjectInfo:
        with self._understanding(path):
            return info_of(path, self._json(self._done(answer, path), path))

    @contextlib.contextmanager
    def _understanding(self, path: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"the store's answer is not understood: {type(error).__name__}: {error}"
            raise StorageError(self._full(path), reason) from error

    def _json(self, answer: Answer, path: str) -> dict[str, Any]:
        try:
            found = json.loads(answer.body)
        except ValueError as error:
            what = "an HTML page and no JSON" if answer.body.lstrip()[:1] == b"<" else f"no JSON: {error}"
            reason = f"the answer from {self._endpoint.url} is {what}: it is no Google Cloud Storage, or not all of it"
            raise StorageError(self._full(path), reason) from error
        if not isinstance(found, dict):
            raise StorageError(self._full(path), "the store's answer is no JSON object")
        return found
