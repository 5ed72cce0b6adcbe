"""A module's weights: read from the checkpoint, and written as safetensors under the names that Transformers expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from distckpt.format import names
from distckpt.format.arrow.dtypes import VALUE
from distckpt.reader import CheckpointReader
from distckpt.sharding.chunks import dtype_from_name

MAX_FILE_BYTES = 5 << 30
"""The most that one safetensors file holds, unless a single tensor is larger."""


class Weights:
    """What a checkpoint holds below ``key``, by the names that the module itself has for it."""

    def __init__(self, reader: CheckpointReader, key: str, dtype: torch.dtype | None) -> None:
        self._reader = reader
        self._prefix = f"{key}."
        self._dtype = dtype
        self._state: dict[str, Any] | None = None
        keys = [key for key in list(reader.keys()) if key.startswith(self._prefix)]
        if not keys:
            raise ValueError(f"{reader.path} holds nothing below {key!r}")
        tensors = [key for key in keys if reader.info(key).dtype != VALUE]
        self._values = sorted(set(keys).difference(tensors))
        self.sizes = {self._name(key): self._nbytes(key) for key in tensors}
        """Every tensor's name and its size in bytes, as it will be written."""

    def read(self, tensors: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors, on the CPU."""
        if self._state is not None:
            return {name: self._state[name] for name in tensors}
        found = self._reader.load([f"{self._prefix}{name}" for name in tensors])
        return {self._name(key): self._converted(tensor) for key, tensor in found.items()}

    def state(self) -> dict[str, Any]:
        """All of it, plain values too, as the module's ``load_state_dict`` takes it. It is kept for later reads."""
        values = {self._name(key): self._reader.value(key) for key in self._values}
        self._state = {**self.read(self.sizes), **values}
        return self._state

    def _name(self, key: str) -> str:
        return key[len(self._prefix) :]

    def _nbytes(self, key: str) -> int:
        info = self._reader.info(key)
        dtype = dtype_from_name(info.dtype)
        size = info.nbytes // dtype.itemsize
        return size * (self._dtype if self._dtype is not None and dtype.is_floating_point else dtype).itemsize

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor


def without_tied(weights: Weights, tied: Mapping[str, str]) -> list[str]:
    """The tensors to write: of those that are the same only the first. ValueError if they are not the same."""
    pairs = {name: same for name, same in tied.items() if name in weights.sizes and same in weights.sizes}
    for name, same in pairs.items():
        found = weights.read([name, same])
        if not _equal(found[name], found[same]):
            raise ValueError(f"{name} and {same} are one weight in the module, but differ in the checkpoint")
    return [name for name in weights.sizes if name not in pairs]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def files_of(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which safetensors file: as many as fit, in their order."""
    parts: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = max_bytes
        parts[-1].append(name)
        room -= size
    return {names.weights_part(part, len(parts)): tensors for part, tensors in enumerate(parts, 1)}


def index_of(files: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What ``model.safetensors.index.json`` says, as Transformers reads it."""
    where = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": sum(sizes[name] for name in where)}, "weight_map": where}


def write_safetensors(weights: Weights, tensors: Sequence[str], tied: Mapping[str, str], path: str) -> None:
    """Write a safetensors file. ``tied`` goes into its metadata, where ``safetensors.torch.load_model`` looks for it."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("exporting needs safetensors: pip install 'distckpt[export]'") from error
    found = {name: tensor.contiguous() for name, tensor in weights.read(tensors).items()}
    save_file(found, path, {**tied, "format": "pt"})
