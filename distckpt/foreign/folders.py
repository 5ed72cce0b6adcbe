"""Weights in several files, and the index that says which of them has which tensor, as Hugging Face lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.files import File, Folder
from distckpt.format.limits import shown

MAX_INDEX_BYTES = 256 << 20


def read_weight_map(folder: Folder, index: File) -> tuple[dict[str, File], dict[str, str]]:
    """The files that an index names, by name, and in which of them each tensor is.

    DamagedError for an index that names anything but files beside it.
    """
    weights = _weight_map(index)
    files = {name: folder.named_in(name, index) for name in sorted(set(weights.values()))}
    return files, weights


def names_only(name: str, index: File) -> bool:
    """Whether an index speaks of the file of that name alone, as it does where an export has fitted into one file."""
    try:
        return set(_weight_map(index).values()) == {name}
    except DamagedError:
        return False


def _weight_map(index: File) -> dict[str, str]:
    try:
        said: Any = json.loads(index.content(MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedError(index.url, f"no sound JSON: {error}") from error
    weights = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise DamagedError(index.url, "it has no weight_map from tensors to file names")
    return weights


def check_weight_map(index: File, weights: Mapping[str, str], found: Mapping[str, str]) -> None:
    """DamagedError unless every tensor that the index speaks of is in the file that it says. Files may have others too."""
    for name, file in weights.items():
        if found.get(name) != file:
            is_there = found.get(name, "nowhere")
            raise DamagedError(index.url, f"it says that {shown(file)} has it, and it is in {is_there}", name)
