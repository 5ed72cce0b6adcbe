"""Sealed JSON: one strictly typed object of text that carries its own CRC32C as its last member.

``{...,"crc32c":"89abcdef"}`` and a newline; the CRC32C covers every byte before ``,"crc32c"``. Reading goes from the
cheap and safe to the strict: size, nesting, format version, checksum, then the types, and only then what they say.
What a reader would refuse is not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, TypeVar

import crc32c
import msgspec
import numpy as np

from distckpt.errors import DamagedError, UnsupportedFormatError

FORMAT = 1
MAX_NESTING = 16

_SEAL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\n')
SEAL_BYTES = len(b',"crc32c":"89abcdef"}\n')
"""How many bytes of a file come after the body that its checksum is of."""

_OTHER_BYTES = bytes(byte for byte in range(256) if chr(byte) not in '"[]{}')


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that stands on storage as sealed JSON, of ``MAX_BYTES`` at most, in version ``FORMAT`` of its format."""

    MAX_BYTES: ClassVar[int]
    FORMAT: ClassVar[int] = FORMAT

    def problems(self) -> Iterator[str]:
        """Why it makes no sense, whoever wrote it. A reader refuses it for the first reason."""
        return iter(())


T = TypeVar("T", bound=Sealed)


class _Version(msgspec.Struct):
    format: msgspec.Raw


def seal(record: Sealed) -> bytes:
    """The record as sealed JSON that every reader will take and find equal.

    ValueError if there is none: for a NaN, say, for what makes no sense, or for what is too long.
    """
    body = msgspec.json.encode(record)[:-1]
    data = body + seal_of(crc32c.crc32c(body))
    name = type(record).__name__
    try:
        same = unseal(data, type(record), name, record.MAX_BYTES) == record
    except DamagedError as error:
        raise ValueError(f"this {name} cannot be stored: {error.reason}") from error
    if not same:
        raise ValueError(f"this {name} would read back as another one")
    return data


def seal_of(crc: int) -> bytes:
    """What stands in place of the closing brace of an object's text, all before which has this CRC32C."""
    return b',"crc32c":"%08x"}\n' % crc


def unseal(data: bytes, kind: type[T], path: str, max_bytes: int) -> T:
    """What was sealed at ``path``, checksum and types verified; nothing is coerced.

    Raises UnsupportedFormatError for a format version other than ours, DamagedError for everything else: too large
    (over ``max_bytes``), too deep, cut short, flipped, not a ``kind``, or one that makes no sense.
    """
    if len(data) > max_bytes:
        raise DamagedError(path, f"{len(data)} bytes long, and {max_bytes} is the most that is read")
    if _nested_deeper(data, MAX_NESTING):
        raise DamagedError(path, f"JSON nested deeper than {MAX_NESTING} levels")
    problem = _seal_problem(data)
    _check_version(data, path, problem, kind.FORMAT)
    if problem:
        raise DamagedError(path, problem)
    try:
        record = msgspec.json.decode(data[:-SEAL_BYTES] + b"}", type=kind)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"not a {kind.__name__}: {error}") from error
    for found in record.problems():
        raise DamagedError(path, found)
    return record


def _seal_problem(data: bytes) -> str:
    tail = _SEAL.fullmatch(data[-SEAL_BYTES:])
    if tail is None:
        return f"its {len(data)} bytes do not end with a checksum: cut short, or not written by distckpt"
    found, expected = crc32c.crc32c(data[:-SEAL_BYTES]), int(tail[1], 16)
    return "" if found == expected else f"CRC32C is {found:08x} and should be {expected:08x}"


def _check_version(data: bytes, path: str, problem: str, known: int) -> None:
    """Look at the version before anything else, so that a newer format is named even if it is sealed in another way."""
    try:
        version = bytes(msgspec.json.decode(data, type=_Version).format)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, problem or f"no format version can be read: {error}") from error
    if version == b"%d" % known:
        return
    found = version[:20].decode("ascii", "replace")
    doubt = f" (or it is damaged: {problem})" if problem else ""
    raise UnsupportedFormatError(path, f"format version {found}, and this release reads version {known}{doubt}")


def _nested_deeper(data: bytes, levels: int) -> bool:
    """Whether brackets outside strings nest deeper than ``levels``. Linear in time and memory for any input."""
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    plain = data if b"\\" not in data else data.replace(b"\\\\", b"").replace(b'\\"', b"")
    left = plain.translate(None, _OTHER_BYTES)
    text = np.frombuffer(left, dtype=np.uint8)
    inside = np.logical_xor.accumulate(text == ord('"'))
    step = _STEPS[text]
    step[inside] = 0
    return int(np.cumsum(step[step != 0], dtype=np.int64).max(initial=0)) > levels


def _steps() -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    table = np.zeros(256, dtype=np.int8)
    table[[ord("["), ord("{")]] = 1
    table[[ord("]"), ord("}")]] = -1
    return table


_STEPS = _steps()
