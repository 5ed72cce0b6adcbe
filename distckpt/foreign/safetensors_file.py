"""Safetensors files: a header that says where which tensor lies, every word of it checked before anything is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.contents import Held, check_shape
from distckpt.foreign.files import File, read
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.format.limits import shown

MAX_HEADER_BYTES = 100_000_000
"""What the format itself allows."""

LENGTH_BYTES = 8
METADATA = "__metadata__"

DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""The format's names of element types, and torch's."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors in the order of their bytes, and its metadata.

    ``refused`` are tensors of types that torch does not have.
    """

    tensors: Mapping[str, Held]
    metadata: Mapping[str, str]
    refused: Mapping[str, str]


def is_safetensors(file: File) -> bool:
    """Whether a file looks like one, by its first bytes."""
    if file.size < LENGTH_BYTES + 2:
        return False
    begin = file.read(0, LENGTH_BYTES + 1)
    return begin[-1:] == b"{" and int.from_bytes(begin[:LENGTH_BYTES], "little") <= file.size - LENGTH_BYTES


def read_header(file: File) -> Header:
    """The header of a file. DamagedError if it is not sound, or speaks of other bytes than the file has, each once."""
    with file.opened() as source:
        length = int.from_bytes(read(source, 0, LENGTH_BYTES), "little") if file.size >= LENGTH_BYTES else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - LENGTH_BYTES):
            raise DamagedError(file.url, f"no safetensors file: its header cannot be {length} bytes long")
        text = read(source, LENGTH_BYTES, length)
    try:
        said = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DamagedError(file.url, f"its header is no sound JSON: {error}") from error
    if not isinstance(said, dict):
        raise DamagedError(file.url, "its header is no JSON object")
    metadata = said.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError(file.url, "its metadata are not texts")
    return _checked(file, LENGTH_BYTES + length, said, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _checked(file: File, data: int, said: Mapping[str, Any], metadata: Mapping[str, str]) -> Header:
    places = sorted(((*_offsets(file, name, entry), name) for name, entry in said.items()), key=lambda one: one[:2])
    tensors: dict[str, Held] = {}
    refused: dict[str, str] = {}
    reached = 0
    for begin, end, name in places:
        if begin != reached:
            raise DamagedError(file.url, f"tensors overlap, or leave a hole, at byte {data + reached}", name)
        reached = end
        shape = check_shape(file.url, name, said[name]["shape"])
        kind = said[name]["dtype"]
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            refused[name] = f"elements of type {shown(str(kind))}, which torch does not have"
            continue
        if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
            raise DamagedError(file.url, f"{end - begin} bytes are not {list(shape)} elements of {dtype}", name)
        tensors[name] = Held(file, data + begin, dtype, shape)
    if data + reached != file.size:
        raise DamagedError(file.url, f"it has {file.size} bytes, and its header speaks of {data + reached}")
    return Header(tensors, metadata, refused)


def _offsets(file: File, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(file.url, "not what a header says of a tensor", name)
    offsets = entry["data_offsets"]
    if not (
        isinstance(entry["shape"], list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(offset) is int for offset in offsets)
        and 0 <= offsets[0] <= offsets[1] <= file.size
    ):
        raise DamagedError(file.url, "a tensor outside of the file", name)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DamagedError(file.url, "a name that is no valid Unicode", name.encode("ascii", "replace").decode())
    return offsets[0], offsets[1]
