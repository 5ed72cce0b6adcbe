"""What a pickle describes, found out without unpickling: its steps are read as data, and nothing is called or imported.

A pickle is a program that builds objects by calling what it names. Here only what it names of plain containers, numbers,
texts and tensors is made, by this module's own hands. All else becomes Opaque, which remembers the name.
"""

from __future__ import annotations

import pickletools
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from distckpt.errors import DamagedError
from distckpt.format.arrow.dtypes import ITEM_SIZES


@dataclass(frozen=True, slots=True)
class Name:
    """Something that a pickle names, ``torch.FloatStorage`` say."""

    text: str


@dataclass(slots=True, eq=False)
class Opaque:
    """What only unpickling could make; ``what`` says it in words.

    Of an object of a class, or what a function gives, that is ``name``, called with ``arguments``, and then given ``state``.
    """

    what: str
    name: str = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of tensors, in a record of its own: ``numel`` elements of ``dtype``, of bytes if that is not said."""

    key: str
    dtype: str
    numel: int

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.item_size


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: where it lies in a storage, in elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": "uint8",
}
"""The classes that torch has for the memory of tensors, and what their elements are."""

_QUANTIZED: Mapping[str, int] = {"torch.QInt8Storage": 1, "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4}
"""The bytes of an element of storages that cannot be read, but passed, where others follow them."""

_PLAIN_TENSORS = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}

_MARK = Opaque("a mark")


def read_pickle(data: bytes | IO[bytes], where: str, item_sizes: dict[str, int] | None = None) -> Any:
    """The tree that the pickle describes, with View for tensors and Opaque for what is not made here.

    Of a stream one pickle is read. ``item_sizes`` gets, by their keys, the bytes of an element of all storages that it
    speaks of, also inside of what is not made. DamagedError, naming ``where``, for what is no pickle.
    """
    machine = _Machine(where, {} if item_sizes is None else item_sizes)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        [tree] = machine.stack
    except DamagedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise DamagedError(where, f"no sound pickle: {type(error).__name__}: {error}") from error
    if tree is _MARK:
        raise DamagedError(where, "no sound pickle: it describes nothing")
    return tree


@dataclass(slots=True)
class _Machine:
    """The stack and the memo of a pickle, and the sizes of elements of the storages that it speaks of."""

    where: str
    item_sizes: dict[str, int]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, argument: Any) -> None:
        """Do what one step says."""
        done = _STEPS.get(name)
        if done is not None:
            done(self, argument)
        elif name in _PUSHING:
            self.stack.append(argument)
        elif name not in ("PROTO", "FRAME"):
            raise DamagedError(self.where, f"a pickle with {name}, which no checkpoint has")

    def marked(self) -> list[Any]:
        """What is above the last mark, which goes too."""
        at = max(number for number, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def fill(self, pairs: list[Any]) -> None:
        """Keys and values, one after the other, go into the dict on top."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))
        elif not isinstance(target, Opaque):
            raise DamagedError(self.where, "a pickle that puts items into what is no dict")

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif not isinstance(target, Opaque):
            raise DamagedError(self.where, "a pickle that appends to what is no list")

    def called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            return Opaque("an object that is made by another")
        make = _MADE.get(function.text)
        found = make(*arguments) if make is not None else None
        return _opaque(function, arguments) if found is None else found

    def build(self) -> None:
        """State for the object on top: of what is made here only the attributes of an OrderedDict, which say nothing."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state

    def stored(self, pid: Any) -> None:
        kind, storage, key, _, numel, *view = pid
        if view not in ([], [None]):
            raise DamagedError(self.where, "a storage that is a part of another, as very old files have them")
        if kind != "storage" or not isinstance(storage, Name) or type(key) is not str or type(numel) is not int:
            raise DamagedError(self.where, "a pickle that refers to something that is no storage")
        dtype = STORAGES.get(storage.text)
        size = _QUANTIZED.get(storage.text) if dtype is None else ITEM_SIZES[dtype]
        if size is not None:
            self.item_sizes[key] = size
        self.stack.append(Opaque(f"a tensor in a {storage.text}") if dtype is None else Storage(key, dtype, numel))


_PUSHING = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.called(function, arguments))


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    plain = isinstance(kind, Name) and kind.text in _NEW and not arguments
    machine.stack.append(_MADE[kind.text]() if plain else _opaque(kind, arguments))


def _new_object_with_names(machine: _Machine, _: Any) -> None:
    del machine.stack[-2:]
    machine.stack.append(_opaque(machine.stack.pop()))


def _instance(machine: _Machine, argument: Any) -> None:
    machine.marked()
    machine.stack.append(_opaque(Name(".".join(str(argument).split(" ")))))


def _object(machine: _Machine, _: Any) -> None:
    kind, *_rest = machine.marked()
    machine.stack.append(_opaque(kind))


def _opaque(kind: Any, arguments: Any = ()) -> Opaque:
    if not isinstance(kind, Name):
        return Opaque("an object that is made by another")
    return Opaque(f"an object of {kind.text}", kind.text, arguments if isinstance(arguments, tuple) else ())


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = str(argument).partition(" ")
    # Up to protocol 2 Python writes the name that it had in Python 2.
    machine.stack.append(_named(f"{'builtins' if module == '__builtin__' else module}.{name}"))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise DamagedError(machine.where, "a pickle that names something by no text")
    machine.stack.append(_named(f"{module}.{name}"))


def _named(text: str) -> Any:
    """A dtype is what it is; all else that is named waits for what is done with it."""
    home, _, name = text.partition(".")
    found = getattr(torch, name, None) if home == "torch" and name in ITEM_SIZES else None
    return found if isinstance(found, torch.dtype) else Name(text)


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.marked()


def _setitem(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.fill([key, value])


def _append(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    machine.extend([item])


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        items = tuple(machine.stack[-count:])
        if len(items) < count or _MARK in items:
            raise DamagedError(machine.where, "a pickle with too little on its stack")
        machine.stack[-count:] = [items]

    return step


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_SET": lambda machine, _: machine.stack.append(set()),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.marked())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": lambda machine, _: machine.stack.append(machine.marked()),
    "DICT": lambda machine, _: machine.stack.append(_pairs(machine.marked())),
    "FROZENSET": lambda machine, _: machine.stack.append(frozenset(machine.marked())),
    "APPEND": _append,
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": _setitem,
    "SETITEMS": lambda machine, _: machine.fill(machine.marked()),
    "PUT": lambda machine, number: machine.put(number),
    "BINPUT": lambda machine, number: machine.put(number),
    "LONG_BINPUT": lambda machine, number: machine.put(number),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "POP": lambda machine, _: machine.stack.__delitem__(-1),
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_with_names,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stored(machine.stack.pop()),
}


# ---- what is made ---------------------------------------------------------------------------------------------------


def _view(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> View | Opaque | None:
    """A tensor. ``rest``: requires_grad, hooks, and metadata, such as that it is to be conjugated."""
    metadata = rest[2] if len(rest) > 2 else None
    return _viewed(storage, storage.dtype if isinstance(storage, Storage) else "", offset, size, stride, metadata)


def _typed_view(
    storage: Any, offset: Any, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> View | Opaque | None:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else ""
    return _viewed(storage, name, offset, size, stride, metadata)


def _viewed(storage: Any, dtype: str, offset: Any, size: Any, stride: Any, metadata: Any) -> View | Opaque | None:
    if isinstance(storage, Opaque):
        return storage
    if dtype not in ITEM_SIZES:
        return Opaque(f"a tensor of a type that cannot be stored ({dtype or 'unknown'})")
    if metadata:
        return Opaque("a tensor that is to be conjugated or negated when it is loaded")
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, Storage)
        or len(size) != len(stride)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise ValueError("a tensor of no shape")
    return View(storage, dtype, offset, tuple(size), tuple(stride))


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a class of its own, which is nothing here unless that is one of torch's plain ones."""
    if isinstance(function, Name) and isinstance(kind, Name) and kind.text in _PLAIN_TENSORS and function.text in _MADE:
        return _MADE[function.text](*arguments)
    return _opaque(kind)


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes | None:
    return text.encode("latin1") if type(text) is str and encoding in ("latin1", "latin-1") else None


def _bytearray(data: Any = b"", *encoding: Any) -> bytearray | None:
    content = _bytes(data, *encoding) if encoding else data
    return bytearray(content) if isinstance(content, bytes) else None


def _device(*where: Any) -> torch.device | None:
    fits = where and type(where[0]) is str and all(type(part) is int for part in where[1:])
    try:
        return torch.device(*where) if fits else None
    except RuntimeError:
        return None


_NEW = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}

_MADE: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda items=(): Counter(items),
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.complex": lambda real=0, imag=0: complex(real, imag),
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda data=b"": bytes(data) if isinstance(data, (bytes, list, tuple)) else None,
    "_codecs.encode": _bytes,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": _device,
}
