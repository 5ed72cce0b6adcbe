"""Sealed JSON: one strictly typed object of text that carries its own CRC32C as its last member.

``{...,"crc32c":"89abcdef"}`` and a newline; the CRC32C covers every byte before ``,"crc32c"``. Reading goes from the
cheap and safe to the strict: size, nesting, format version, checksum, and only then the types.
"""

from __future__ import annotations

import re
from typing import TypeVar

import crc32c
import msgspec
import numpy as np

from distckpt.errors import DamagedError, UnsupportedFormatError

FORMAT = 1
MAX_NESTING = 16

_SEAL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\n')
_SEAL_BYTES = len(b',"crc32c":"89abcdef"}\n')

T = TypeVar("T", bound=msgspec.Struct)


class _Version(msgspec.Struct):
    format: msgspec.Raw


def seal(record: msgspec.Struct) -> bytes:
    """The record as sealed JSON that is known to read back equal. ValueError if it would not, as with a NaN."""
    body = msgspec.json.encode(record)[:-1]
    data = body + b',"crc32c":"%08x"}\n' % crc32c.crc32c(body)
    name = type(record).__name__
    try:
        same = unseal(data, type(record), name, len(data)) == record
    except DamagedError as error:
        raise ValueError(f"this {name} cannot be stored: {error.reason}") from error
    if not same:
        raise ValueError(f"this {name} would read back as another one")
    return data


def unseal(data: bytes, kind: type[T], path: str, max_bytes: int) -> T:
    """What was sealed at ``path``, checksum and types verified; nothing is coerced.

    Raises UnsupportedFormatError for a format version other than ours, DamagedError for everything else: too large
    (over ``max_bytes``), too deep, cut short, flipped, or not a ``kind``.
    """
    if len(data) > max_bytes:
        raise DamagedError(path, f"{len(data)} bytes long, and {max_bytes} is the most that is read")
    if _nested_deeper(data, MAX_NESTING):
        raise DamagedError(path, f"JSON nested deeper than {MAX_NESTING} levels")
    problem = _seal_problem(data)
    _check_version(data, path, problem)
    if problem:
        raise DamagedError(path, problem)
    try:
        return msgspec.json.decode(data[:-_SEAL_BYTES] + b"}", type=kind)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"not a {kind.__name__}: {error}") from error


def _seal_problem(data: bytes) -> str:
    tail = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if tail is None:
        return f"its {len(data)} bytes do not end with a checksum: cut short, or not written by distckpt"
    found, expected = crc32c.crc32c(data[:-_SEAL_BYTES]), int(tail[1], 16)
    return "" if found == expected else f"CRC32C is {found:08x} and should be {expected:08x}"


def _check_version(data: bytes, path: str, problem: str) -> None:
    """Look at the version before anything else, so that a newer format is named even if it is sealed in another way."""
    try:
        version = bytes(msgspec.json.decode(data, type=_Version).format)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, problem or f"no format version can be read: {error}") from error
    if version == b"%d" % FORMAT:
        return
    found = version[:20].decode("ascii", "replace")
    doubt = f" (or it is damaged: {problem})" if problem else ""
    raise UnsupportedFormatError(path, f"format version {found}, and this release reads version {FORMAT}{doubt}")


def _nested_deeper(data: bytes, levels: int) -> bool:
    """Whether brackets outside strings nest deeper than ``levels``. Linear in time and memory for any input."""
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    text = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
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
