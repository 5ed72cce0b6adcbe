"""What an S3 answers, read without trust in it, and the little that it is told in XML."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from distckpt.storage.interface import ObjectInfo
from distckpt.storage.paths import is_part

MOST_XML = 8 << 20
"""Bytes: a page of a listing has at most a thousand names, each of at most 1024 bytes."""

_WHOLE = "FULL_OBJECT"


class NotUnderstood(Exception):
    """An answer that is none of an S3."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing. ``following`` is what to ask the next page with, None after the last."""

    objects: tuple[ObjectInfo, ...]
    folders: tuple[str, ...]
    following: str | None


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that nobody has finished, begun at ``begun`` in epoch seconds of the server's clock."""

    key: str
    upload_id: str
    begun: float


@dataclass(frozen=True, slots=True)
class Uploads:
    """A part of the list of uploads; ``following`` as in Page: markers of key and upload."""

    uploads: tuple[Upload, ...]
    following: tuple[str, str] | None


def crc_header(crc: int) -> str:
    """A CRC32C as S3 writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def crc_of(text: str | None) -> int | None:
    """A CRC32C that S3 has written so; None if it is none, or one of parts, which has their number at its end."""
    try:
        found = base64.b64decode(text or "", validate=True)
    except ValueError:
        return None
    return int.from_bytes(found, "big") if len(found) == 4 else None


def info_of(path: str, size: int, headers: Mapping[str, str]) -> ObjectInfo:
    """What the headers of an answer say of the object at ``path``."""
    # Of what came in parts it may be a sum of sums, unless it is said not to be.
    in_parts = "-" in headers.get("etag", "")
    is_of_whole = headers.get("x-amz-checksum-type", "" if in_parts else _WHOLE) == _WHOLE
    crc = crc_of(headers.get("x-amz-checksum-crc32c")) if is_of_whole else None
    return ObjectInfo(path, size, _http_time(headers), crc)


def size_of(headers: Mapping[str, str]) -> int:
    """The length of the object that HEAD answered. NotUnderstood if it does not say."""
    text = headers.get("content-length", "")
    if not text.isdecimal():
        raise NotUnderstood("an answer without the object's length")
    return int(text)


def page_of(body: bytes, root: str, prefix: str) -> Page:
    """One page of ListObjectsV2 with ``prefix``; paths are what follows ``root``. NotUnderstood if it is none.

    Left out are names that no store accepts, such as the empty ones with which some tools mark folders.
    """
    tree = _parse(body, "ListBucketResult")
    plain = _plain(tree)
    objects, folders = [], []
    for entry in tree.iterfind("Contents"):
        key = _below(prefix, plain(_text(entry, "Key")))
        if is_part(key[len(prefix) :]):
            # Headers have whole seconds, and the same object is of the same time everywhere.
            begun = float(int(_iso_time(_text(entry, "LastModified"))))
            objects.append(ObjectInfo(key[len(root) :], _number(_text(entry, "Size")), begun))
    for entry in tree.iterfind("CommonPrefixes"):
        name = _below(prefix, plain(_text(entry, "Prefix")))[len(prefix) :].removesuffix("/")
        if is_part(name):
            folders.append(name)
    following = tree.findtext("NextContinuationToken") if _goes_on(tree) else None
    return Page(tuple(objects), tuple(folders), following)


def _below(prefix: str, key: str) -> str:
    if not key.startswith(prefix):
        raise NotUnderstood(f"a listing with {key[:100]!r} in it, which was not asked for")
    return key


def _goes_on(tree: ElementTree.Element) -> bool:
    text = tree.findtext("IsTruncated", "false")
    if text not in ("true", "false"):
        raise NotUnderstood(f"a listing of which it is not clear whether it goes on: {text[:100]!r}")
    return text == "true"


def upload_id_of(body: bytes) -> str:
    """The name of the upload that was begun. NotUnderstood if there is none."""
    return _text(_parse(body, "InitiateMultipartUploadResult"), "UploadId")


def uploads_of(body: bytes) -> Uploads:
    """One page of ListMultipartUploads. NotUnderstood if it is none."""
    tree = _parse(body, "ListMultipartUploadsResult")
    plain = _plain(tree)
    found = [
        Upload(plain(_text(entry, "Key")), _text(entry, "UploadId"), _iso_time(_text(entry, "Initiated")))
        for entry in tree.iterfind("Upload")
    ]
    if not _goes_on(tree):
        return Uploads(tuple(found), None)
    return Uploads(tuple(found), (plain(_text(tree, "NextKeyMarker")), tree.findtext("NextUploadIdMarker") or ""))


def parts_of(body: bytes) -> tuple[int, float, str | None]:
    """Of one page of ListParts: bytes, when the newest part came (0 if none has), and what to ask the next page with."""
    tree = _parse(body, "ListPartsResult")
    parts = tree.findall("Part")
    newest = max((_iso_time(_text(part, "LastModified")) for part in parts), default=0.0)
    size = sum(_number(_text(part, "Size")) for part in parts)
    return size, newest, tree.findtext("NextPartNumberMarker") if _goes_on(tree) else None


def check_copied(body: bytes) -> None:
    """NotUnderstood if an object was not copied: a server may say 200 first, and only then that it failed."""
    _parse(body, "CopyObjectResult")


def completed_crc_of(body: bytes) -> int | None:
    """What the server holds, after an upload was completed: CRC32C, or None if it has none of the whole.

    NotUnderstood if that is no success: a server may say 200 first, and only then that it failed.
    """
    tree = _parse(body, "CompleteMultipartUploadResult")
    return crc_of(tree.findtext("ChecksumCRC32C")) if tree.findtext("ChecksumType") == _WHOLE else None


def completion(parts: Sequence[tuple[str, int]]) -> bytes:
    """What CompleteMultipartUpload is told: ETag and CRC32C of each part, in order."""
    tree = ElementTree.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
    for number, (etag, crc) in enumerate(parts, 1):
        part = ElementTree.SubElement(tree, "Part")
        for name, value in (("ChecksumCRC32C", crc_header(crc)), ("ETag", etag), ("PartNumber", str(number))):
            ElementTree.SubElement(part, name).text = value
    return ElementTree.tostring(tree)


def _parse(body: bytes, root: str) -> ElementTree.Element:
    """The tree, without name spaces."""
    try:
        text = body.decode()
        if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
            raise NotUnderstood(f"an HTML page instead of a {root}: it is no S3, or something before it answers")
        if "<!" in text:  # no S3 declares anything, and what can be declared can be made to grow
            raise NotUnderstood("an answer with declarations in it")
        tree = ElementTree.fromstring(text.strip())
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
        raise NotUnderstood(f"an answer that is no XML: {error}") from error
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
    if tree.tag not in (root, root.replace("Result", "Response")):  # as some write it
        told = ": ".join(filter(None, (tree.findtext("Code"), tree.findtext("Message"))))
        raise NotUnderstood(f"a {tree.tag[:40]} instead of a {root}{f', {told[:300]}' if told else ''}")
    return tree


def _plain(tree: ElementTree.Element) -> Callable[[str], str]:
    """Makes names what they are: servers that can encode them, as XML cannot hold every character."""
    return unquote_plus if tree.findtext("EncodingType") == "url" else str


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(name)
    if text is None:
        raise NotUnderstood(f"a {element.tag} without {name}")
    return text


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise NotUnderstood(f"{text[:40]!r} for a number")
    return int(text)


def _iso_time(text: str) -> float:
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise NotUnderstood(f"{text[:40]!r} for a time") from error
    return (found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)).timestamp()


def _http_time(headers: Mapping[str, str]) -> float:
    try:
        return parsedate_to_datetime(headers.get("last-modified") or headers.get("date", "")).timestamp()
    except (TypeError, ValueError):
        return 0.0
