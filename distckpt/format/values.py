"""Plain values as typed JSON: what can be written comes back equal and of the same type, and reading runs no code.

JSON's own forms stand for themselves. Everything else is an object with one member whose name begins with ``$``:
``{"$tuple":[1,2]}``. A dict with such a name, or with a key that is no str, is written as ``{"$dict":[[key,value]]}``.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, EnumMeta
from types import ModuleType
from typing import Any, NoReturn

import msgspec

from distckpt.errors import DamagedError, EncodeError

MAX_DEPTH = 100
SMALLEST_SLOT = 64

DICTS = (dict, OrderedDict, defaultdict)
"""The dicts that are stored; all come back as dict."""

_INT64 = 1 << 63
_BIG_INT = re.compile(r"-?[1-9a-f][0-9a-f]*")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_TORCH_NAME = re.compile(r"[a-z][a-z0-9_]*")
_NUMPY_SCALAR = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[mM]8(\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
_NUMPY_DTYPE = re.compile(_NUMPY_SCALAR.pattern + r"|[<>|][SUV][0-9]{1,9}")

_ADVICE = (
    "Give its owner state_dict() and load_state_dict(), wrap what belongs to one rank in PerRank, or store plain values"
)
_TENSOR_ADVICE = "Tensors and arrays are stored where they are items of a dict, list or tuple, and nowhere else"
_TENSORS = {("torch", "Tensor"), ("numpy", "ndarray")}

_At = tuple[Any, Any]  # (the place it is in, the step from there): text is made of it only when something is refused


@dataclass(frozen=True, slots=True)
class UnresolvedEnum:
    """An enum member whose class this process has not imported. ``type_name`` is ``module:qualified.name``."""

    type_name: str
    member: str
    value: Any


def encode_value(value: object, key: str) -> bytes:
    """The typed JSON text of ``value``; equal values give equal bytes in every process.

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
        return _value(msgspec.json.decode(data), 0)
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
    if _find_enum(kind.__module__, kind.__qualname__) is not kind:
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
    if isinstance(value, np.generic) and _NUMPY_SCALAR.fullmatch(value.dtype.str):
        return {"$numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.dtype) and _NUMPY_DTYPE.fullmatch(value.str) and np.dtype(value.str) == value:
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


# ---- reading ------------------------------------------------------------------------------------------------------
# These raise ValueError or TypeError for what is malformed; decode_value says where.


def _value(node: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if type(node) is list:
        return [_value(item, depth + 1) for item in node]
    if type(node) is not dict:
        return node
    if not any(name.startswith("$") for name in node):
        return {name: _value(item, depth + 1) for name, item in node.items()}
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
    return [_value(item, depth + 1) for item in _list(content)]


def _big_int(content: Any, depth: int) -> int:
    return int(_text(content, _BIG_INT), 16)


def _not_finite(content: Any, depth: int) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(_text(content, _HEX_FLOAT)))[0]
    if math.isfinite(number):
        raise ValueError("inf or nan is expected")
    return number


def _complex(content: Any, depth: int) -> complex:
    real, imaginary = (_value(part, depth) for part in _list(content, 2))
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
    found = {_value(name, depth + 1): _value(item, depth + 1) for name, item in pairs}
    if len(found) != len(pairs):
        raise ValueError("a dict with equal keys")
    return found


def _enum(content: Any, depth: int) -> Any:
    module, name, member = map(_text, _list(content, 4)[:3])
    value = _value(content[3], depth + 1)
    kind = _find_enum(module, name)
    if kind is not None and member in kind.__members__:
        return kind.__members__[member]
    return UnresolvedEnum(f"{module}:{name}", member, value)


def _find_enum(module: str, name: str) -> EnumMeta | None:
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
    dtype, raw = np.dtype(_text(kind, _NUMPY_SCALAR)), _bytes(data)
    if len(raw) != dtype.itemsize:
        raise ValueError(f"{dtype.itemsize} bytes are expected")
    return np.frombuffer(raw, dtype)[0]


def _numpy_dtype(content: Any, depth: int) -> Any:
    import numpy as np

    return np.dtype(_text(content, _NUMPY_DTYPE))


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
