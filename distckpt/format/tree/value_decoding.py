"""Reading typed JSON: from what msgspec makes of the text to the value it stands for. Runs no code that it names.

Whatever is malformed raises ValueError or TypeError; ``values.decode_value`` says where it was.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import EnumMeta
from types import ModuleType
from typing import Any

MAX_DEPTH = 100

NUMPY_SCALAR = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[mM]8(\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
NUMPY_DTYPE = re.compile(NUMPY_SCALAR.pattern + r"|[<>|][SUV][0-9]{1,9}")
_BIG_INT = re.compile(r"-?[1-9a-f][0-9a-f]*")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_TORCH_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class UnresolvedEnum:
    """An enum member whose class this process has not imported. ``type_name`` is ``module:qualified.name``."""

    type_name: str
    member: str
    value: Any


def value_of(node: Any, depth: int = 0) -> Any:
    """The value that ``node``, decoded JSON, stands for. ValueError or TypeError if it stands for none."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if type(node) is list:
        return [value_of(item, depth + 1) for item in node]
    if type(node) is not dict:
        return node
    if not any(name.startswith("$") for name in node):
        return {name: value_of(item, depth + 1) for name, item in node.items()}
    if len(node) != 1:
        raise ValueError("a tag beside other members")
    [(tag, content)] = node.items()
    decode = _DECODERS.get(tag)
    if decode is None:
        raise ValueError(f"unknown tag {tag[:40]!r}")
    return decode(content, depth)


def _list(content: Any, length: int | None = None) -> list[Any]:
    if type(content) is not list or (length is not None and len(content) != length):
        raise ValueError(f"a list of {'any number of' if length is None else length} items is expected")
    return content


def _text(content: Any, pattern: re.Pattern[str] | None = None) -> str:
    if type(content) is not str or (pattern is not None and not pattern.fullmatch(content)):
        raise ValueError("a str of another form is expected")
    return content


def _bytes(content: Any) -> bytes:
    return base64.b64decode(_text(content), validate=True)


def _items(content: Any, depth: int) -> list[Any]:
    return [value_of(item, depth + 1) for item in _list(content)]


def _big_int(content: Any, depth: int) -> int:
    return int(_text(content, _BIG_INT), 16)


def _not_finite(content: Any, depth: int) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(_text(content, _HEX_FLOAT)))[0]
    if math.isfinite(number):
        raise ValueError("inf or nan is expected")
    return number


def _complex(content: Any, depth: int) -> complex:
    real, imaginary = (value_of(part, depth) for part in _list(content, 2))
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("two floats are expected")
    return complex(real, imaginary)


def _set(content: Any, depth: int) -> set[Any]:
    items = _items(content, depth)
    found = set(items)
    if len(found) != len(items):
        raise ValueError("a set with equal items")
    return found


def _dict(content: Any, depth: int) -> dict[Any, Any]:
    pairs = [_list(pair, 2) for pair in _list(content)]
    found = {value_of(name, depth + 1): value_of(item, depth + 1) for name, item in pairs}
    if len(found) != len(pairs):
        raise ValueError("a dict with equal keys")
    return found


def _enum(content: Any, depth: int) -> Any:
    module, name, member = map(_text, _list(content, 4)[:3])
    value = value_of(content[3], depth + 1)
    kind = find_enum(module, name)
    if kind is not None and member in kind.__members__:
        return kind.__members__[member]
    return UnresolvedEnum(f"{module}:{name}", member, value)


def find_enum(module: str, name: str) -> EnumMeta | None:
    """The enum class of that name in a module that is imported already. Runs no code of that module."""
    found: Any = sys.modules.get(module)
    if not isinstance(found, ModuleType):
        return None
    # A module's or class's own __getattr__ could import or do anything, so only its dictionary is looked at.
    for part in name.split("."):
        if not isinstance(found, ModuleType | type):
            return None
        found = object.__getattribute__(found, "__dict__").get(part)
    return found if isinstance(found, EnumMeta) else None


def _numpy(content: Any, depth: int) -> Any:
    import numpy as np

    kind, data = map(_text, _list(content, 2))
    if kind == "str":
        return np.str_(data)
    if kind == "bytes":
        return np.bytes_(_bytes(data))
    dtype, raw = np.dtype(_text(kind, NUMPY_SCALAR)), _bytes(data)
    if len(raw) != dtype.itemsize:
        raise ValueError(f"{dtype.itemsize} bytes are expected")
    return np.frombuffer(raw, dtype)[0]


def _numpy_dtype(content: Any, depth: int) -> Any:
    import numpy as np

    return np.dtype(_text(content, NUMPY_DTYPE))


def _torch_size(content: Any, depth: int) -> Any:
    import torch

    if any(type(item) is not int for item in _list(content)):
        raise ValueError("a list of int is expected")
    return torch.Size(content)


def _torch_dtype(content: Any, depth: int) -> Any:
    import torch

    found = vars(torch).get(_text(content, _TORCH_NAME))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {content[:40]!r}")  # noqa: TRY004
    return found


def _torch_device(content: Any, depth: int) -> Any:
    import torch

    try:
        return torch.device(_text(content))
    except RuntimeError as error:
        raise ValueError(f"no device {content[:40]!r}") from error


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "$int": _big_int,
    "$float": _not_finite,
    "$complex": _complex,
    "$bytes": lambda content, depth: _bytes(content),
    "$tuple": lambda content, depth: tuple(_items(content, depth)),
    "$set": _set,
    "$frozenset": lambda content, depth: frozenset(_set(content, depth)),
    "$dict": _dict,
    "$enum": _enum,
    "$numpy": _numpy,
    "$numpy.dtype": _numpy_dtype,
    "$torch.Size": _torch_size,
    "$torch.dtype": _torch_dtype,
    "$torch.device": _torch_device,
}
