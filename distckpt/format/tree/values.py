"""Plain values as typed JSON: what can be written comes back equal and of the same type, and reading runs no code.

JSON's own forms stand for themselves. Everything else is an object with one member whose name begins with ``$``:
``{"$tuple":[1,2]}``. A dict with such a name, or with a key that is no str, is written as ``{"$dict":[[key,value]]}``.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NoReturn

import msgspec

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.value_decoding import (
    MAX_DEPTH,
    NUMPY_DTYPE,
    NUMPY_SCALAR,
    UnresolvedEnum,
    find_enum,
    value_of,
)

__all__ = [
    "DICTS",
    "MAX_DEPTH",
    "UnresolvedEnum",
    "capacity_for",
    "decode_value",
    "encode_value",
    "pad_value",
]

SMALLEST_SLOT = 64

DICTS = (dict, OrderedDict, defaultdict)
"""The dicts that are stored; all come back as dict."""

_INT64 = 1 << 63

_ADVICE = (
    "Give its owner state_dict() and load_state_dict(), wrap what belongs to one rank in PerRank, or store plain values"
)
_TENSOR_ADVICE = "Tensors and arrays are stored where they are items of a dict, list or tuple, and nowhere else"
_TENSORS = {("torch", "Tensor"), ("numpy", "ndarray")}

_At = tuple[Any, Any]  # (the place it is in, the step from there): text is made of it only when something is refused


def encode_value(value: object, key: str) -> bytes:
    """The typed JSON text of ``value``; the same value gives the same bytes in every process.

    Raises EncodeError, naming ``key``, for what could come back only through pickle, and beyond 100 levels.
    """
    try:
        return msgspec.json.encode(_plain(value, (None, key), 0))
    except UnicodeEncodeError as error:
        raise EncodeError(key, "a str with half a surrogate pair cannot be stored: it is not valid Unicode") from error


def decode_value(data: bytes | bytearray | memoryview, path: str, key: str) -> Any:
    """The value that ``data`` says; blanks at its end do not count.

    An enum's class is looked up among the modules that are imported already; otherwise UnresolvedEnum is returned.
    Raises DamagedError, naming ``path`` and ``key``, for anything that encode_value does not write.
    """
    try:
        return value_of(msgspec.json.decode(data))
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(path, f"not the text of a value: {error}", key) from error


def pad_value(data: bytes, capacity: int) -> bytes:
    """``data`` and blanks, ``capacity`` bytes together. ValueError if it is longer than that."""
    if len(data) > capacity:
        raise ValueError(f"{len(data)} bytes do not fit into {capacity}")
    return data.ljust(capacity, b" ")


def capacity_for(nbytes: int) -> int:
    """Bytes to reserve for a value of ``nbytes``: a power of two, so that it may grow before the layout must change."""
    return max(SMALLEST_SLOT, 1 << (nbytes - 1).bit_length()) if nbytes else SMALLEST_SLOT


# ---- writing ------------------------------------------------------------------------------------------------------


def _plain(value: Any, at: _At, depth: int) -> Any:
    """What msgspec shall write for ``value``."""
    if depth > MAX_DEPTH:
        _refuse(at, f"is nested deeper than {MAX_DEPTH} levels, or holds itself")
    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value, at, depth)
    if isinstance(value, Enum):
        return _plain_enum(value, at, depth)
    origin = type(value).__module__.partition(".")[0]
    if origin == "numpy":
        return _plain_numpy(value, at)
    if origin == "torch":
        return _plain_torch(value, at)
    return _refuse_type(value, at)


def _plain_int(value: int, at: _At, depth: int) -> Any:
    return value if -_INT64 <= value < _INT64 else {"$int": format(value, "x")}


def _plain_float(value: float, at: _At, depth: int) -> Any:
    return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}


def _plain_complex(value: complex, at: _At, depth: int) -> Any:
    return {"$complex": [_plain_float(value.real, at, depth), _plain_float(value.imag, at, depth)]}


def _plain_bytes(value: bytes, at: _At, depth: int) -> Any:
    return {"$bytes": base64.b64encode(value).decode()}


def _plain_items(value: Iterable[Any], at: _At, depth: int) -> list[Any]:
    return [_plain(item, (at, index), depth + 1) for index, item in enumerate(value)]


def _plain_tuple(value: tuple[Any, ...], at: _At, depth: int) -> Any:
    return {"$tuple": _plain_items(value, at, depth)}


def _plain_set(value: set[Any] | frozenset[Any], at: _At, depth: int) -> Any:
    # Sorted by text: the order of a set differs from process to process, and ranks compare their bytes.
    items = sorted(_plain_items(value, at, depth), key=msgspec.json.encode)
    return {"$frozenset" if type(value) is frozenset else "$set": items}


def _plain_dict(value: dict[Any, Any], at: _At, depth: int) -> Any:
    if all(type(name) is str and not name.startswith("$") for name in value):
        return {name: _plain(item, (at, name), depth + 1) for name, item in value.items()}
    return {
        "$dict": [
            [_plain(name, (at, name), depth + 1), _plain(item, (at, name), depth + 1)] for name, item in value.items()
        ]
    }


def _plain_enum(value: Enum, at: _At, depth: int) -> Any:
    kind = type(value)
    if find_enum(kind.__module__, kind.__qualname__) is not kind:
        _refuse(at, f"is of the enum {kind.__qualname__}, which no import can find. Define it at the top of a module")
    if kind.__members__.get(value.name) is not value:
        _refuse(at, f"is a combination of members of {kind.__qualname__}. Store its value instead")
    return {"$enum": [kind.__module__, kind.__qualname__, value.name, _plain(value.value, at, depth + 1)]}


def _plain_unresolved(value: UnresolvedEnum, at: _At, depth: int) -> Any:
    module, _, name = value.type_name.partition(":")
    return {"$enum": [module, name, value.member, _plain(value.value, at, depth + 1)]}


def _plain_numpy(value: Any, at: _At) -> Any:
    import numpy as np

    if type(value) is np.str_:
        return {"$numpy": ["str", str(value)]}
    if type(value) is np.bytes_:
        return {"$numpy": ["bytes", base64.b64encode(value).decode()]}
    if isinstance(value, np.generic) and NUMPY_SCALAR.fullmatch(value.dtype.str):
        return {"$numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.dtype) and NUMPY_DTYPE.fullmatch(value.str) and np.dtype(value.str) == value:
        return {"$numpy.dtype": value.str}
    return _refuse_type(value, at)


def _plain_torch(value: Any, at: _At) -> Any:
    import torch

    if type(value) is torch.Size:
        return {"$torch.Size": list(value)}
    if type(value) is torch.dtype:
        return {"$torch.dtype": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"$torch.device": str(value)}
    return _refuse_type(value, at)


def _refuse_type(value: object, at: _At) -> NoReturn:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    is_tensor = any((base.__module__, base.__name__) in _TENSORS for base in kind.__mro__)
    _refuse(at, f"is of type {name}, which cannot be stored. {_TENSOR_ADVICE if is_tensor else _ADVICE}")


def _refuse(at: _At, what: str) -> NoReturn:
    steps: list[str] = []
    parent, step = at
    while parent is not None:
        steps.append(f"[{step!r:.100}]")
        parent, step = parent
    inside = "".join(reversed(steps[-8:])) + ("..." if len(steps) > 8 else "")
    raise EncodeError(step, f"what is at {inside} {what}" if steps else what)


_ENCODERS: dict[type, Callable[[Any, _At, int], Any]] = {
    type(None): lambda value, at, depth: value,
    bool: lambda value, at, depth: value,
    str: lambda value, at, depth: value,
    int: _plain_int,
    float: _plain_float,
    complex: _plain_complex,
    bytes: _plain_bytes,
    list: _plain_items,
    tuple: _plain_tuple,
    set: _plain_set,
    frozenset: _plain_set,
    UnresolvedEnum: _plain_unresolved,
    **dict.fromkeys(DICTS, _plain_dict),
}
