"""The pickle of a tree of tensors and plain values, as ``torch.save`` makes it and ``torch.load`` takes with weights_only."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distckpt.foreign.pickles import STORAGES
from distckpt.foreign.streaming import Streamed
from distckpt.format.arrow.dtypes import ITEM_SIZES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "torch.storage.UntypedStorage"}
_INT32 = 1 << 31


def make_pickle(tree: Any, keys: Mapping[int, str]) -> bytes:
    """The bytes. ``keys`` has for each tensor, by its identity, the name of the record that holds its bytes.

    ValueError, naming the key, for what ``torch.load`` would not take without unpickling.
    """
    maker = _Maker(keys)
    maker.add(tree, "")
    return b"\x80\x02" + b"".join(maker.parts) + b"."


class _Maker:
    def __init__(self, keys: Mapping[int, str]) -> None:
        self.parts: list[bytes] = []
        self._keys = keys

    def add(self, node: Any, key: str) -> None:
        """What pushes ``node``."""
        if isinstance(node, Streamed):
            self._tensor(node)
        elif type(node) in (dict, OrderedDict, Counter):
            self._dict(node, key)
        elif type(node) in (list, tuple):
            self._sequence(node, key)
        elif type(node) is set:
            self._called("builtins", "set", [list(node)], key)
        elif isinstance(node, torch.Size):
            self._called("torch", "Size", [tuple(node)], key)
        elif isinstance(node, torch.device):
            self._called("torch", "device", [str(node)], key)
        elif isinstance(node, torch.dtype):
            self._name("torch", str(node).removeprefix("torch."))
        elif type(node) is complex:
            self._called("builtins", "complex", [node.real, node.imag], key)
        elif type(node) is bytes:
            self._called("_codecs", "encode", [node.decode("latin1"), "latin1"], key)
        elif type(node) is int:
            self.parts.append(_int(node, key))
        else:
            push = _ATOMS.get(type(node))
            if push is None:
                raise ValueError(
                    f"{key}: an object of {type(node).__module__}.{type(node).__qualname__} is nothing that torch.load takes with "
                    "weights_only. Leave it out by --leave-out KEY"
                )
            self.parts.append(push(node))

    def _dict(self, node: Mapping[Any, Any], key: str) -> None:
        if type(node) is dict:
            self.parts.append(b"}")
        elif isinstance(node, Counter):
            self._called("collections", "Counter", [dict(node)], key)
            return
        else:
            self._called("collections", "OrderedDict", [], key)
        if node:
            self.parts.append(b"(")
            for name, item in node.items():
                inside = f"{key}.{name}" if key else str(name)
                self.add(name, inside)
                self.add(item, inside)
            self.parts.append(b"u")

    def _sequence(self, node: list[Any] | tuple[Any, ...], key: str) -> None:
        is_list = type(node) is list
        if not node:
            self.parts.append(b"]" if is_list else b")")
            return
        self.parts.append(b"](" if is_list else b"(")
        for number, item in enumerate(node):
            self.add(item, f"{key}.{number}")
        self.parts.append(b"e" if is_list else b"t")

    def _name(self, module: str, name: str) -> None:
        self.parts.append(f"c{module}\n{name}\n".encode())

    def _called(self, module: str, name: str, arguments: list[Any], key: str) -> None:
        self._name(module, name)
        self.add(tuple(arguments), key)
        self.parts.append(b"R")

    def _tensor(self, tensor: Streamed) -> None:
        typed = _STORAGE_OF.get(tensor.dtype)
        numel = math.prod(tensor.shape)
        strides = tuple(math.prod(tensor.shape[at + 1 :]) for at in range(len(tensor.shape)))
        self._name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.parts.append(b"((")
        self.add("storage", "")
        self._name(*(typed or "torch.storage.UntypedStorage").rsplit(".", 1))
        self.add(self._keys[id(tensor)], "")
        self.add("cpu", "")
        self.add(numel if typed else numel * ITEM_SIZES[tensor.dtype], "")
        self.parts.append(b"tQ")
        arguments: tuple[Any, ...] = (0, tensor.shape, strides, False, OrderedDict())
        for argument in arguments:
            self.add(argument, "")
        if not typed:
            self._name("torch", tensor.dtype)
        self.parts.append(b"tR")


def _int(value: int, key: str) -> bytes:
    if -_INT32 <= value < _INT32:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise ValueError(
            f"{key}: a number of {len(data)} bytes is nothing that torch.load takes with weights_only. Leave it out by "
            "--leave-out KEY"
        )
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


_ATOMS: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    float: lambda value: b"G" + struct.pack(">d", value),
    str: _text,
}
