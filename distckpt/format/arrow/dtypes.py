"""Element types by name, known without torch. The names are torch's own, without ``torch.``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

VALUE = "json"
"""The dtype of a plain value: its bytes are typed JSON, not elements."""

ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "uint16": 2,
        "uint32": 4,
        "uint64": 8,
        "int8": 1,
        "int16": 2,
        "int32": 4,
        "int64": 8,
        "float16": 2,
        "bfloat16": 2,
        "float32": 4,
        "float64": 8,
        "complex32": 4,
        "complex64": 8,
        "complex128": 16,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "float8_e4m3fnuz": 1,
        "float8_e5m2fnuz": 1,
        "float8_e8m0fnu": 1,
    }
)
"""Bytes of one element of every tensor type that can be stored."""


def is_dtype(name: str) -> bool:
    """Whether a chunk can be of that type: a tensor's, or ``json``."""
    return name == VALUE or name in ITEM_SIZES
