"""Reading typed JSON: from what msgspec makes of the text to the value it stands for. Runs no code that it names.

Whatever is malformed raises ValueError or TypeError; ``values.decode_value`` says where it was.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

from distckpt.format.tree import containers, standard
from distckpt.format.tree.arrays import NUMPY_DTYPE, NUMPY_SCALAR, read_array
from distckpt.format.tree.classes import UnresolvedEnum, check_key, find_enum
from distckpt.format.tree.content import Read, bytes_in, list_in, text_in
from distckpt.format.tree.generators import read_numpy_generator, read_torch_generator

MAX_DEPTH = 100

_BIG_INT = re.compile(r"-?[1-9a-f][0-9a-f]*")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_TORCH_NAME = re.compile(r"[a-z][a-z0-9_]*")

_HOLDERS = {list, dict}


def value_of(node: Any, depth: int = 0) -> Any:
    """The value that ``node``, decoded JSON, stands for. ValueError or TypeError if it stands for none."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if type(node) is list:
        if _are_atoms(node, depth):
            return node
        return [value_of(item, depth + 1) for item in node]
    if type(node) is not dict:
        return node
    if not any(name[:1] == "$" for name in node):
        return (
            node
            if _are_atoms(node.values(), depth)
            else {name: value_of(item, depth + 1) for name, item in node.items()}
        )
    if len(node) != 1:
        raise ValueError("a tag beside other members")
    [(tag, content)] = node.items()
    decode = _DECODERS.get(tag)
    if decode is None:
        raise ValueError(f"unknown tag {tag[:40]!r}")
    return decode(content, depth)


def _are_atoms(nodes: Collection[Any], depth: int) -> bool:
    """Whether they stand for themselves, as a million numbers do, in one list or in rows: then none is looked at."""
    kinds = set(map(type, nodes))
    if kinds == {list} and depth + 1 < MAX_DEPTH:
        return _HOLDERS.isdisjoint(map(type, chain.from_iterable(nodes)))
    return depth < MAX_DEPTH and kinds.isdisjoint(_HOLDERS)


def _items(content: Any, depth: int) -> list[Any]:
    return [value_of(item, depth + 1) for item in list_in(content)]


def _big_int(content: Any, depth: int) -> int:
    return int(text_in(content, _BIG_INT), 16)


def _not_finite(content: Any, depth: int) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(text_in(content, _HEX_FLOAT)))[0]
    if math.isfinite(number):
        raise ValueError("inf or nan is expected")
    return number


def _complex(content: Any, depth: int) -> complex:
    real, imaginary = (value_of(part, depth) for part in list_in(content, 2))
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("two floats are expected")
    return complex(real, imaginary)


def _set(content: Any, depth: int) -> set[Any]:
    items = _items(content, depth)
    for item in items:
        check_key(item)
    found = set(items)
    if len(found) != len(items):
        raise ValueError("a set with equal items")
    return found


def _dict(content: Any, depth: int) -> dict[Any, Any]:
    pairs = [list_in(pair, 2) for pair in list_in(content)]
    names, items = (value_of([pair[at] for pair in pairs], depth) for at in (0, 1))
    for name in names:
        check_key(name)
    found = dict(zip(names, items, strict=True))
    if len(found) != len(pairs):
        raise ValueError("a dict with equal keys")
    return found


def _enum(content: Any, depth: int) -> Any:
    module, name, member = map(text_in, list_in(content, 4)[:3])
    value = value_of(content[3], depth + 1)
    kind = find_enum(module, name)
    if kind is not None and member in kind.__members__:
        return kind.__members__[member]
    return UnresolvedEnum(f"{module}:{name}", member, value)


def _numpy(content: Any, depth: int) -> Any:
    import numpy as np

    kind, data = map(text_in, list_in(content, 2))
    if kind == "str":
        return np.str_(data)
    if kind == "bytes":
        return np.bytes_(bytes_in(data))
    dtype, raw = np.dtype(text_in(kind, NUMPY_SCALAR)), bytes_in(data)
    if len(raw) != dtype.itemsize:
        raise ValueError(f"{dtype.itemsize} bytes are expected")
    return np.frombuffer(raw, dtype)[0]


def _numpy_dtype(content: Any, depth: int) -> Any:
    import numpy as np

    return np.dtype(text_in(content, NUMPY_DTYPE))


def _torch_size(content: Any, depth: int) -> Any:
    import torch

    if any(type(item) is not int for item in list_in(content)):
        raise ValueError("a list of int is expected")
    return torch.Size(content)


def _torch_dtype(content: Any, depth: int) -> Any:
    import torch

    found = vars(torch).get(text_in(content, _TORCH_NAME))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {content[:40]!r}")  # noqa: TRY004
    return found


def _torch_device(content: Any, depth: int) -> Any:
    import torch

    try:
        return torch.device(text_in(content))
    except RuntimeError as error:
        raise ValueError(f"no device {content[:40]!r}") from error


def _form(reader: Callable[[Any, Read], Any]) -> Callable[[Any, int], Any]:
    return lambda content, depth: reader(content, lambda node: value_of(node, depth + 1))


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "$int": _big_int,
    "$float": _not_finite,
    "$complex": _complex,
    "$bytes": lambda content, depth: bytes_in(content),
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
    "$torch.Generator": _form(read_torch_generator),
    "$numpy.array": _form(read_array),
    "$numpy.random": _form(read_numpy_generator),
    **{tag: _form(reader) for tag, reader in (standard.READERS | containers.READERS).items()},
}
