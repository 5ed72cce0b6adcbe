"""Which formats of other programs are read: for each, what tells it, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.foreign.contents import Contents, contents_of
from distckpt.foreign.files import File, Folder, nothing_known, place
from distckpt.foreign.folders import check_weight_map, read_weight_map
from distckpt.foreign.safetensors_file import Header, is_safetensors, joined, read_header
from distckpt.format import names
from distckpt.storage import PathLike


@dataclass(frozen=True, slots=True)
class Found:
    """A place to be read: the ``folder``, or the one ``file`` in it that was meant. ``under`` names what has no name."""

    folder: Folder
    file: File | None
    under: str

    @property
    def path(self) -> str:
        """What people call it."""
        return self.folder.url if self.file is None else f"{self.folder.url}/{self.file.name}"


Read = Callable[[Found], Contents | None]
"""Reads what is at a place; None if that is of another format. Nothing of a tensor's bytes is read."""

FORMATS: list[Read] = []
"""Asked one after the other. Another format is another line here."""


def read_contents(path: PathLike, storage_options: Mapping[str, Any] | None = None, under: str = "model") -> Contents:
    """What is at ``path``. ``under`` is what a state dict is called that has no name of its own.

    CheckpointNotFoundError if it is nothing that is known here, DamagedError if it is not sound.
    """
    folder, file = place(path, storage_options)
    found = Found(folder, file, under)
    for read in FORMATS:
        contents = read(found)
        if contents is not None:
            return contents
    raise nothing_known(found.path)


def _safetensors(found: Found) -> Contents | None:
    if found.file is None or not is_safetensors(found.file):
        return None
    return _weights("safetensors file", found, read_header(found.file))


def _hugging_face(found: Found) -> Contents | None:
    if found.file is not None:
        return None
    index = found.folder.find(names.WEIGHTS_INDEX)
    if index is None:
        file = found.folder.find(names.WEIGHTS)
        return None if file is None else _weights("folder with model.safetensors", found, read_header(file))
    files, weights = read_weight_map(found.folder, index)
    headers = {name: read_header(file) for name, file in files.items()}
    header = joined(headers.values(), index.url)
    check_weight_map(
        index, weights, {key: name for name, one in headers.items() for key in (*one.tensors, *one.refused)}
    )
    return _weights(f"folder with {len(files)} safetensors files", found, header)


def _weights(kind: str, found: Found, header: Header) -> Contents:
    refused = {f"{found.under}.{name}": why for name, why in header.refused.items()}
    return contents_of(kind, found.path, {found.under: dict(header.tensors)}, refused)


def known() -> Sequence[Read]:
    """All of them."""
    return tuple(FORMATS)


FORMATS += [_safetensors, _hugging_face]
