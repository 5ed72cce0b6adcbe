"""Plain values as typed JSON: what can be written comes back equal and of the same type, and reading runs no code.

JSON's own forms stand for themselves. Everything else is an object with one member whose name begins with ``$``:
``{"$tuple":[1,2]}``. A dict with such a name, or with a key that is no str, is written as ``{"$dict":[[key,value]]}``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from typing import Any, NoReturn

import msgspec

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.arrays import NUMPY_DTYPE, NUMPY_SCALAR, is_tensor_array, write_array
from distckpt.format.tree.classes import Refused, Unresolved, UnresolvedEnum, check_key, find_enum, type_name
from distckpt.format.tree.containers import is_container, write_container
from distckpt.format.tree.content import HERE, Write, WriteAll, as_text
from distckpt.format.tree.generators import is_numpy_generator, write_numpy_generator, write_torch_generator
from distckpt.format.tree.many import ATOMS, INT64, plain_many
from distckpt.format.tree.standard import write_standard
from distckpt.format.tree.value_decoding import MAX_DEPTH, value_of

__all__ = [
    "MAX_DEPTH",
    "Unresolved",
    "UnresolvedEnum",
    "capacity_for",
    "decode_value",
    "encode_value",
    "is_tensor_array",
    "pad_value",
]

SMALLEST_SLOT = 64

_ADVICE = (
    "Give its owner state_dict() and load_state_dict(), wrap what belongs to one rank in PerRank, or store plain values"
)
_TENSOR_ADVICE = "Tensors and arrays are stored where they are items of a dict, list or tuple, and nowhere else"
_OBJECT_ADVICE = "Give it to Checkpoint under a name of its own: such objects are not looked for inside of containers"
_OBJECTS = {"torch.nn.modules.module.Module", "torch.optim.optimizer.Optimizer", "distckpt.state.objects.PerRank"}
_TENSORS = {"torch.Tensor", "numpy.ndarray"}

_At = tuple[Any, Any]  # (the place it is in, the step from there): text is made of it only when something is refused


def encode_value(value: object, key: str) -> bytes:
    """The typed JSON text of ``value``; the same value gives the same bytes in every process.

    Raises EncodeError, naming ``key``, for what could come back only through pickle, and beyond 100 levels.
    """
    try:
        return msgspec.json.encode(_plain(value, (None, key), 0))
    except EncodeError:
        raise
    except UnicodeEncodeError as error:
        raise EncodeError(key, "a str with half a surrogate pair cannot be stored: it is not valid Unicode") from error
    except RecursionError as error:
        raise EncodeError(key, "is nested too deeply for the stack that is left here") from error
    except Exception as error:
        raise EncodeError(
            key, f"reading it raised {type_name(type(error))}. Store plain values, and change none while they are saved"
        ) from error


def decode_value(data: bytes | bytearray | memoryview, path: str, key: str) -> Any:
    """The value that ``data`` says; blanks at its end do not count.

    Classes are looked up among the modules that are imported already, and none of their code runs; without its class a
    value comes back as Unresolved, an enum's member as UnresolvedEnum.
    Raises DamagedError, naming ``path`` and ``key``, for anything that encode_value does not write.
    """
    try:
        return value_of(msgspec.json.decode(data))
    except (msgspec.MsgspecError, ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
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
    try:
        if issubclass(type(value), Enum):
            return _plain_enum(value, at, depth)
        form = _form(
            value,
            lambda part, step: _plain(part, at if step is HERE else (at, step), depth + 1),
            lambda parts, steps: _plain_items(parts, at, depth, steps),
        )
    except Refused as why:
        _refuse(at, str(why))
    return _refuse_type(value, at) if form is None else form


def _form(value: Any, write: Write, write_all: WriteAll) -> Any:
    """The typed form of a value that has no encoder below; None if there is none."""
    origin = type_name(type(value)).partition(".")[0]
    form = None
    if origin == "numpy":
        form = _plain_numpy(value, write)
    elif origin == "torch":
        form = _plain_torch(value)
    if form is None:
        form = write_standard(value, write)
    if form is None and is_container(value):
        form = write_container(value, write, write_all)
    return form


def _plain_int(value: int, at: _At, depth: int) -> Any:
    return value if -INT64 <= value < INT64 else {"$int": format(value, "x")}


def _plain_float(value: float, at: _At, depth: int) -> Any:
    return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}


def _plain_complex(value: complex, at: _At, depth: int) -> Any:
    return {"$complex": [_plain_float(value.real, at, depth), _plain_float(value.imag, at, depth)]}


def _plain_bytes(value: bytes, at: _At, depth: int) -> Any:
    return {"$bytes": as_text(value)}


def _plain_items(items: Sequence[Any], at: _At, depth: int, steps: Iterable[Any] | None = None) -> Sequence[Any]:
    """What msgspec shall write for the items of what is ``at``, to which these steps lead, or their numbers."""
    plain = plain_many(items, _plain_atom, MAX_DEPTH - depth - 1) if depth < MAX_DEPTH else None
    if plain is not None:
        return plain
    named = enumerate(items) if steps is None else zip(steps, items, strict=True)
    return [_plain(item, (at, step), depth + 1) for step, item in named]


def _plain_atom(value: Any) -> Any:
    return _ENCODERS[type(value)](value, (None, ""), 0)


def _plain_list(value: list[Any], at: _At, depth: int) -> Any:
    return _plain_items(value, at, depth)


def _plain_tuple(value: tuple[Any, ...], at: _At, depth: int) -> Any:
    return {"$tuple": _plain_items(value, at, depth)}


def _plain_set(value: set[Any] | frozenset[Any], at: _At, depth: int) -> Any:
    # Sorted by text: the order of a set differs from process to process, and ranks compare their bytes.
    _check_keys(value, at)
    items = sorted(_plain_items(list(value), at, depth), key=msgspec.json.encode)
    return {"$frozenset" if type(value) is frozenset else "$set": items}


def _plain_dict(value: dict[Any, Any], at: _At, depth: int) -> Any:
    items = list(value.values())
    if set(map(type, value)) <= {str} and not any(name[:1] == "$" for name in value):
        plain = _plain_items(items, at, depth, value)
        return value if plain is items else dict(zip(value, plain, strict=True))
    _check_keys(value, at)
    names = _plain_items(list(value), at, depth, value)
    return {"$dict": list(zip(names, _plain_items(items, at, depth, value), strict=True))}


def _check_keys(keys: Collection[Any], at: _At) -> None:
    if set(map(type, keys)) <= ATOMS:
        return
    for key in keys:
        try:
            check_key(key)
        except Refused as why:
            _refuse((at, key), str(why))


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


def _plain_described(value: Unresolved, at: _At, depth: int) -> Any:
    module, _, name = value.type_name.partition(":")
    if value.kind == "path":
        return {"$path": [name, value.content]}
    if value.kind == "torch.Generator":
        return {"$torch.Generator": [value.type_name, as_text(value.content)]}
    if value.kind == "subclass":
        return {"$subclass": [module, name, _plain(value.content, at, depth + 1)]}
    return {f"${value.kind}": [module, name, {key: _plain(item, (at, key), depth + 1) for key, item in value.content}]}


def _plain_numpy(value: Any, write: Write) -> Any:
    import numpy as np

    if type(value) is np.str_:
        return {"$numpy": ["str", str(value)]}
    if type(value) is np.bytes_:
        return {"$numpy": ["bytes", as_text(value)]}
    if isinstance(value, np.generic) and NUMPY_SCALAR.fullmatch(value.dtype.str):
        return {"$numpy": [value.dtype.str, as_text(value.tobytes())]}
    if isinstance(value, np.dtype) and NUMPY_DTYPE.fullmatch(value.str) and np.dtype(value.str) == value:
        return {"$numpy.dtype": value.str}
    if is_numpy_generator(value):
        return write_numpy_generator(value, write)
    return write_array(value) if issubclass(type(value), np.ndarray) and not is_tensor_array(value) else None


def _plain_torch(value: Any) -> Any:
    import torch

    if type(value) is torch.Size:
        return {"$torch.Size": list(value)}
    if type(value) is torch.dtype:
        return {"$torch.dtype": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"$torch.device": str(value)}
    return write_torch_generator(value) if type(value) is torch.Generator else None


def _refuse_type(value: object, at: _At) -> NoReturn:
    kind = type(value)
    is_tensor = any(type_name(base) in _TENSORS for base in type.mro(kind))
    advice = _TENSOR_ADVICE if is_tensor else _OBJECT_ADVICE if _is_an_object(kind) else _ADVICE
    _refuse(at, f"is of type {type_name(kind)}, which cannot be stored. {advice}")


def _is_an_object(kind: type) -> bool:
    """Whether a Checkpoint knows what to do with it, if it gets it by a name and not as an item of a container."""
    names = {type_name(base) for base in type.mro(kind)}
    return not names.isdisjoint(_OBJECTS) or all(hasattr(kind, method) for method in ("state_dict", "load_state_dict"))


def _refuse(at: _At, what: str) -> NoReturn:
    steps: list[str] = []
    parent, step = at
    while parent is not None:
        steps.append(f"[{_shown(step):.100}]")
        parent, step = parent
    inside = "".join(reversed(steps[-8:])) + ("..." if len(steps) > 8 else "")
    raise EncodeError(step, f"what is at {inside} {what}" if steps else what)


def _shown(step: Any) -> str:
    try:
        return repr(step)
    except Exception:  # noqa: BLE001  a class of the user's that fails to print itself is still named
        return f"<{type_name(type(step))}>"


_ENCODERS: dict[type, Callable[[Any, _At, int], Any]] = {
    type(None): lambda value, at, depth: value,
    bool: lambda value, at, depth: value,
    str: lambda value, at, depth: value,
    int: _plain_int,
    float: _plain_float,
    complex: _plain_complex,
    bytes: _plain_bytes,
    list: _plain_list,
    tuple: _plain_tuple,
    set: _plain_set,
    frozenset: _plain_set,
    dict: _plain_dict,
    UnresolvedEnum: _plain_unresolved,
    Unresolved: _plain_described,
}
