"""``distckpt export``: a part of a checkpoint as files of another program, whole at their place or not there at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.foreign.streaming import Streamed
from distckpt.foreign.writing import Order, Write, Written
from distckpt.foreign.writing_dcp import write_dcp
from distckpt.foreign.writing_safetensors import write_safetensors
from distckpt.foreign.writing_torch import write_torch
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.tree.keys import hint, is_below
from distckpt.format.tree.select import select_paths
from distckpt.format.tree.tree import ArrayStep, Path, decode_path, key_of
from distckpt.state.stored import Stored
from distckpt.storage import PathLike
from distckpt.storage.beside import new_folder
from distckpt.transfer.progress import Meter, Progress

WRITERS: dict[str, Write] = {"safetensors": write_safetensors, "torch": write_torch, "dcp": write_dcp}
"""By the name of the format. Another format is another entry."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a checkpoint is to be exported: what is below ``select``, all if it is empty, but not below ``leave_out``."""

    select: str = "model"
    leave_out: tuple[str, ...] = ()


def export(
    stored: Stored,
    destination: PathLike,
    kind: str,
    choice: Choice,
    max_bytes: int,
    about: Mapping[str, str],
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Written]:
    """Write what was chosen to a new folder at ``destination``; durable on return, every byte checked as it was read.

    KeyError, naming similar keys, for a choice of nothing; ValueError for what the format cannot hold;
    AlreadyExistsError if anything is at the destination.
    """
    tensors, values, paths = chosen(stored, choice)
    found = stored.values(values.values())
    meter = Meter(sum(tensor.nbytes for tensor in tensors), progress)
    order = Order(stored, tensors, {name: found[key] for name, key in values.items()}, paths, max_bytes, about, meter)
    with new_folder(destination, storage_options) as store:
        return WRITERS[kind](order, store)


def chosen(stored: Stored, choice: Choice) -> tuple[list[Streamed], dict[str, str], dict[str, Path]]:
    """The tensors that are meant, the plain values, by their names in the files their keys, and of all names the paths."""
    texts = stored.texts
    if choice.select:
        paths = select_paths(texts, choice.select, stored.path, stored.left_out)
    else:
        paths = {key: decode_path(text, stored.path) for key, text in texts.items()}
    for text in choice.leave_out:
        if not any(is_below(key, text) for key in paths):
            raise KeyError(f"{stored.path} has no key {text!r} to leave out{hint(text, list(paths))}")
    tensors: list[Streamed] = []
    values: dict[str, str] = {}
    places: dict[str, Path] = {}
    for key, path in paths.items():
        if any(is_below(key, text) for text in choice.leave_out):
            continue
        name, (dtype, shape) = key_of(path) or key, stored.layout(key)
        places[name] = tuple(step for step in path if not isinstance(step, ArrayStep))  # a tensor there
        if dtype == VALUE:
            values[name] = key
        else:
            tensors.append(Streamed(key, name, dtype, shape))
    if not tensors and not values:
        raise ValueError(f"nothing of {stored.path} is left to export")
    return tensors, values, places


def formats() -> Sequence[str]:
    """Their names."""
    return tuple(WRITERS)
