"""What is asked of Google Cloud Storage in its JSON API, and what it answers, as plain values."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import crc32c

from distckpt.storage.interface import ObjectInfo
from distckpt.storage.remote.http import Request
from distckpt.storage.remote.wire import Piece

UPLOAD = "distckpt-upload"
"""The metadata of an object that was put together: by which upload."""

_BYTES = "application/octet-stream"
_FIELDS = "name,size,crc32c,updated,generation,metadata"
_PAGE = 1000
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")


class Requests:
    """Requests for the objects of ``bucket`` whose names begin with ``prefix``; ``payer`` is a project or None."""

    def __init__(self, bucket: str, prefix: str, payer: str | None) -> None:
        self._bucket = quote(bucket, safe="")
        self._prefix = prefix
        self._payer = {"userProject": payer} if payer else {}

    def kind(self) -> Request:
        """What kind of bucket it is."""
        query = urlencode({"fields": "storageClass,locationType", **self._payer})
        return Request("GET", f"/storage/v1/b/{self._bucket}?{query}")

    def delete(self, path: str) -> Request:
        """Remove an object."""
        return Request("DELETE", self._target("", path))

    def page(self, above: str, fields: str, token: str) -> Request:
        """A page of what lies directly below the folder ``above``, which ends with a slash or is empty."""
        query = {"prefix": self._prefix + above, "delimiter": "/", "fields": fields, "maxResults": str(_PAGE)}
        return Request("GET", self._target("", None, **query, **({"pageToken": token} if token else {})))

    def insert(self, path: str, pieces: Sequence[Piece], crc: int, *, absent: bool, bulk: bool = False) -> Request:
        """Metadata and content in one request. Google refuses it if the CRC32C of what comes is another one.

        Of all the ways to upload this is the one of which emulators check the condition, too.
        """
        boundary = uuid.uuid4().hex
        resource = {"name": self._prefix + path, "contentType": _BYTES, "crc32c": _base64(crc)}
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
        head += f"--{boundary}\r\nContent-Type: {_BYTES}\r\n\r\n"
        condition = {"ifGenerationMatch": "0"} if absent else {}
        target = self._target("/upload", None, uploadType="multipart", fields=_FIELDS, **condition)
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        body = (head.encode(), *pieces, f"\r\n--{boundary}--\r\n".encode())
        return Request("POST", target, headers, body, repeatable=not absent, bulk=bulk)

    def compose(self, path: str, names: Sequence[str], upload: str) -> Request:
        """Put parts together under a name that is free; ``upload`` is noted, so that what came of it is known by."""
        order = {
            "sourceObjects": [{"name": self._prefix + name} for name in names],
            "destination": {"contentType": _BYTES, "metadata": {UPLOAD: upload}},
        }
        target = self._target("", path, "/compose", ifGenerationMatch="0", fields=_FIELDS)
        body = (json.dumps(order).encode(),)
        return Request("POST", target, {"Content-Type": "application/json"}, body, repeatable=False)

    def rewrite(self, source: str, source_bucket: str, path: str, token: str) -> Request:
        """Copy the object ``source``, a whole name, to a name that is free; ``token`` goes on where an answer stopped."""
        there = f"/storage/v1/b/{quote(source_bucket, safe='')}/o/{quote(source, safe='')}/rewriteTo"
        here = f"/b/{self._bucket}/o/{quote(self._prefix + path, safe='')}"
        query = {"ifGenerationMatch": "0", **({"rewriteToken": token} if token else {}), **self._payer}
        headers = {"Content-Type": "application/json"}
        return Request("POST", f"{there}{here}?{urlencode(query)}", headers, repeatable=False)

    def get(self, path: str, **query: str) -> Request:
        """The content, of one ``generation`` if that is given."""
        return Request("GET", self._target("/download", path, alt="media", **query))

    def metadata(self, path: str) -> Request:
        """What there is to know of an object."""
        return Request("GET", self._target("", path, fields=_FIELDS))

    def _target(self, api: str, path: str | None, verb: str = "", **query: str) -> str:
        name = "" if path is None else f"/{quote(self._prefix + path, safe='')}"
        asked = urlencode({**query, **self._payer})
        return f"{api}/storage/v1/b/{self._bucket}/o{name}{verb}?{asked}"


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing: objects, and prefixes."""

    items: Sequence[Mapping[str, Any]]
    prefixes: Sequence[str]


def uploads(pages: Iterable[Page], prefix: str) -> dict[ObjectInfo, list[str]]:
    """Each upload of which there are parts, all of them as one, as old as the youngest; and their names."""
    infos: dict[str, ObjectInfo] = {}
    parts: dict[str, list[str]] = {}
    for page in pages:
        for resource in page.items:
            path = resource["name"].removeprefix(prefix).rpartition("-")[0]
            before = infos.get(path, ObjectInfo(path, 0, 0.0))
            modified = max(before.modified, _time(resource["updated"]))
            infos[path] = ObjectInfo(path, before.size + int(resource["size"]), modified)
            parts.setdefault(path, []).append(resource["name"])
    return {info: parts[path] for path, info in infos.items()}


def below(name: str, prefix: str, above: str) -> str:
    """The path of an object, or of a folder, in a listing of what is below ``above``. ValueError if it is not."""
    if not name.startswith(prefix + above):
        raise ValueError(f"{name!r} was not asked for")
    return name.removeprefix(prefix)


def info_of(path: str, resource: Mapping[str, Any]) -> ObjectInfo:
    """An object as Google describes it."""
    return ObjectInfo(path, int(resource["size"]), _time(resource["updated"]), crc_of(resource))


def crc_of(resource: Mapping[str, Any]) -> int | None:
    """Google's own CRC32C of it."""
    return int.from_bytes(base64.b64decode(resource["crc32c"]), "big") if resource.get("crc32c") else None


def crc_of_all(pieces: Iterable[Piece]) -> int:
    """The CRC32C of the pieces, one after the other."""
    crc = 0
    for piece in pieces:
        crc = crc32c.crc32c(piece, crc)
    return crc


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _time(text: str) -> float:
    """Epoch seconds of a time as RFC 3339 writes it, with any number of digits after the point."""
    found = _TIME.fullmatch(text)
    if found is None:
        return 0.0
    seconds, fraction, zone = found.groups()
    moment = datetime.fromisoformat(seconds + ("+00:00" if zone == "Z" else zone))
    return moment.timestamp() + float(fraction or 0)
