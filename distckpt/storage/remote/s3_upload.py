"""An object in parts: several on their way at once, and nothing to be seen before all have arrived."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import quote

import crc32c

from distckpt.errors import AlreadyExistsError, StorageError
from distckpt.storage.remote import s3_answers as answers
from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.creating import create
from distckpt.storage.remote.http import Answer, Endpoint, NoAnswer, Outcome, Request
from distckpt.storage.remote.parts import Part, parts_of, send_all
from distckpt.storage.sections import SECTION_MULTIPLE

MOST_PARTS = 10_000
_COMPLETIONS = 3

Look = Callable[[int], bool | None]
"""Whether the object with that CRC32C is there now, another one (False), or none (None)."""


class S3Upload:
    """Puts one object at ``target``, encoded as in a request; people call it ``where``."""

    def __init__(self, endpoint: Endpoint, budget: Budget, target: str, where: str) -> None:
        self._endpoint = endpoint
        self._budget = budget
        self._target = target
        self._where = where
        self._crc = 0

    def put(
        self, size: int, sections: Iterable[memoryview], part_bytes: int, headers: Mapping[str, str], look: Look
    ) -> None:
        """Send it all, or leave nothing: whatever goes wrong, the parts that have arrived are let go of.

        The server is told the CRC32C of each part, and of the whole. Raises as Store.put_unique does.
        """
        part_bytes = max(part_bytes, -(-size // (MOST_PARTS * SECTION_MULTIPLE)) * SECTION_MULTIPLE)
        begun = self._begin(headers)
        try:
            parts = send_all(parts_of(self._summed(sections), part_bytes), begun.send, self._budget)
            begun.complete(parts, self._crc, size, look)
        except BaseException:
            begun.abort()
            raise

    def _summed(self, sections: Iterable[memoryview]) -> Iterator[memoryview]:
        for section in sections:
            self._crc = crc32c.crc32c(section, self._crc)
            yield section

    def _begin(self, headers: Mapping[str, str]) -> _Begun:
        kinds = {"x-amz-checksum-algorithm": "CRC32C", "x-amz-checksum-type": "FULL_OBJECT"}
        octets = {"Content-Type": "application/octet-stream"}
        request = Request("POST", f"{self._target}?uploads=", {**octets, **headers, **kinds})
        payer = {name: value for name, value in headers.items() if name == "x-amz-request-payer"}
        answer = _ask(self._endpoint, request, self._where)
        with _understanding(self._where):
            return _Begun(self._endpoint, self._target, answers.upload_id_of(answer.body), payer, self._where)


class _Begun:
    """An upload that the server knows by a name of its own."""

    def __init__(self, endpoint: Endpoint, target: str, upload_id: str, headers: Mapping[str, str], where: str) -> None:
        self._endpoint = endpoint
        self._target = target
        self._upload = f"uploadId={quote(upload_id, safe='')}"
        self._headers = headers
        self._where = where

    def send(self, number: int, part: Part, stop: threading.Event) -> tuple[str, int]:
        """ETag and CRC32C of a part that has arrived."""
        crc = 0
        for piece in part:
            crc = crc32c.crc32c(piece, crc)
        headers = {**self._headers, "x-amz-checksum-crc32c": answers.crc_header(crc)}
        target = f"{self._target}?partNumber={number + 1}&{self._upload}"
        request = Request("PUT", target, headers, part, bulk=True)
        etag = _ask(self._endpoint, request, self._where, stop).headers.get("etag")
        if not etag:
            raise StorageError(self._where, f"the store took part {number + 1} and gave no ETag for it")
        return etag, crc

    def complete(self, parts: list[tuple[str, int]], crc: int, size: int, look: Look) -> None:
        """Have the object seen, once, under the condition that the name is still free."""
        headers = {
            **self._headers,
            "Content-Type": "application/xml",
            "If-None-Match": "*",
            "x-amz-checksum-crc32c": answers.crc_header(crc),
            "x-amz-checksum-type": "FULL_OBJECT",
            "x-amz-mp-object-size": str(size),
        }
        body = (answers.completion(parts),)
        request = Request("POST", f"{self._target}?{self._upload}", headers, body, repeatable=False)
        for _ in range(_COMPLETIONS):
            try:
                answer = create(self._endpoint, request, lambda: look(crc), self._where)
                if answer is None or self._is_success(answer, crc):
                    return
            except AlreadyExistsError:
                raise
            except StorageError:
                if not self._is_there(look, crc):  # an upload is forgotten as soon as it is completed
                    raise
                return
            except answers.NotUnderstood as error:  # it said 200 first, and then that it failed
                if self._is_there(look, crc):
                    return
                reason = str(error)
        raise StorageError(self._where, f"the store could not put the parts together: {reason}")

    def abort(self) -> None:
        """Let go of what has arrived. If the server does not hear it, a sweep finds it."""
        with contextlib.suppress(NoAnswer, StorageError):
            self._endpoint.once(Request("DELETE", f"{self._target}?{self._upload}", self._headers))

    def _is_success(self, answer: Answer, crc: int) -> bool:
        found = answers.completed_crc_of(answer.body)
        if found not in (None, crc):
            raise StorageError(self._where, f"the store holds bytes of CRC32C {found:08x}, {crc:08x} were sent")
        return True

    def _is_there(self, look: Look, crc: int) -> bool:
        try:
            return bool(look(crc))
        except (NoAnswer, StorageError):
            return False


def _ask(endpoint: Endpoint, request: Request, where: str, stop: threading.Event | None = None) -> Answer:
    try:
        answer = endpoint.ask(request, stop=stop)
    except NoAnswer as error:
        raise StorageError(where, str(error)) from error
    if answer.outcome is not Outcome.DONE:
        raise StorageError(where, f"the store says {answer.said}")
    return answer


@contextlib.contextmanager
def _understanding(where: str) -> Iterator[None]:
    try:
        yield
    except answers.NotUnderstood as error:
        raise StorageError(where, f"the store gave {error}") from error
