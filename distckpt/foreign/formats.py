"""Which formats of other programs are read: for each, what tells it, and what it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.contents import Contents, Held, beside, contents_of
from distckpt.foreign.dcp_folder import read_dcp
from distckpt.foreign.files import File, Found, nothing_known, place
from distckpt.foreign.folders import check_weight_map, names_only, read_weight_map
from distckpt.foreign.lightning import is_lightning, lightning_tree
from distckpt.foreign.safetensors_file import Header, is_safetensors, read_header
from distckpt.foreign.torch_file import is_torch_file, read_torch_file
from distckpt.foreign.training_folders import read_parts, read_sharded
from distckpt.format.others import FSDP, TORCH_WEIGHTS, WEIGHTS
from distckpt.storage import PathLike
from distckpt.terminal.sizes import counted

logger = logging.getLogger(__name__)

Read = Callable[[Found], Contents | None]
"""Reads what is at a place; None if that is of another format. Nothing of a tensor's bytes is read."""

_INDEX_FIRST = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Where one file and the index of several are there, Diffusers loads by the index, the others the one file."""

_BOTH = (
    "%s has both %s and %s, as two saves into one folder leave them: read is %s, as the library does that has saved it. "
    "Delete %s if that is right"
)

_EXTRA_STATE = "_extra_state"
"""What a module may put into its state dict under this name is anything, so also a dict with tensors."""


def read_contents(path: PathLike, storage_options: Mapping[str, Any] | None = None, under: str = "model") -> Contents:
    """What is at ``path``. ``under`` is what a state dict is called that has no name of its own.

    CheckpointNotFoundError if it is nothing that is known here, DamagedError if it is not sound, ValueError for no name.
    """
    if not under:
        raise ValueError(f"under={under!r} is no name. Say what the state dict is to be called, such as 'model'")
    folder, file = place(path, storage_options)
    found = Found(folder, file, under)
    for read in FORMATS:
        contents = read(found)
        if contents is not None:
            return contents
    raise nothing_known(found.path)


# ---- one file -------------------------------------------------------------------------------------------------------


def _safetensors(found: Found) -> Contents | None:
    if found.file is None or not is_safetensors(found.file):
        return None
    tree, refused = _of_header(read_header(found.file), found.under)
    return contents_of("safetensors file", found.path, {found.under: tree}, refused)


def _torch(found: Found) -> Contents | None:
    if found.file is None or not is_torch_file(found.file):
        return None
    tree, refused = read_torch_file(found.file, "")
    if is_lightning(tree):
        tree, refused, number = lightning_tree(tree, refused)
        return contents_of("Lightning checkpoint", found.path, tree, refused, number=number)
    if type(tree) is dict and tree and not _is_state_dict(tree):
        return contents_of("file of torch.save", found.path, tree, refused)
    below = {f"{found.under}.{key}" if key else found.under: why for key, why in refused.items()}
    named = {} if found.under in below else {found.under: tree}
    return contents_of("file of torch.save", found.path, named, below)


def _is_state_dict(tree: Mapping[Any, Any]) -> bool:
    """Whether the tensors of a dict are its own items. Beside dicts of tensors, one is a number: of the best epoch, say."""
    inside = [value for key, value in tree.items() if str(key).rpartition(".")[2] != _EXTRA_STATE]
    has_own = any(isinstance(value, Held) for value in inside)
    return has_own and not any(_holds_tensors(value) for value in inside if not isinstance(value, Held))


def _holds_tensors(node: Any) -> bool:
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return isinstance(node, Held) or any(map(_holds_tensors, items))


# ---- folders --------------------------------------------------------------------------------------------------------


def _folder(found: Found) -> Contents | None:
    """Weights as Hugging Face's libraries save them, and beside them what Accelerate and its Trainer save."""
    if found.file is not None:
        return None
    weights = _weights(found)
    if weights is None:
        return _sharded_folder(found)
    what, tree, refused = weights
    parts = read_parts(found, what)
    if parts is None:
        return contents_of(f"folder with {what}", found.path, {found.under: tree}, refused)
    whole = {found.under: tree, **parts.tree}
    refused = {**refused, **parts.refused}
    return beside(
        contents_of(f"{parts.kind} with {what}", found.path, whole, refused, parts.notes, parts.number), parts.sharded
    )


def _sharded_folder(found: Found) -> Contents | None:
    """As Accelerate saves what FSDP has sharded: the model is a folder too, which DCP has written."""
    what = f"{FSDP}_0"
    model = read_sharded(found, what, "model", found.under)
    if model is None:
        return None
    parts = read_parts(found, what)
    if parts is None:
        return replace(model, kind=f"folder with {what}", path=found.path)
    rest = contents_of(f"{parts.kind} with {what}", found.path, parts.tree, parts.refused, parts.notes, parts.number)
    return beside(rest, (model, *parts.sharded))


def _weights(found: Found) -> tuple[str, dict[str, Any], dict[str, str]] | None:
    """What they lie in, their tree and what could not be read; None if there are none.

    ``save_pretrained`` leaves in a folder what it has written there before: read is what ``from_pretrained`` reads.
    """
    for titles, read in ((WEIGHTS, _read_safetensors), (TORCH_WEIGHTS, _read_torch)):
        for title in titles:
            file, index = found.folder.find(title), found.folder.find(f"{title}.index.json")
            if index is not None and (file is None or title in _INDEX_FIRST):
                if file is not None and not names_only(title, index):
                    logger.warning(_BOTH, found.path, title, index.name, index.name, title)
                return _indexed(found, index, read)
            if file is not None:
                if index is not None and not names_only(title, index):
                    logger.warning(_BOTH, found.path, title, index.name, title, index.name)
                return title, *read(file, found.under)
    return None


def _indexed(
    found: Found, index: File, read: Callable[[File, str], tuple[dict[str, Any], dict[str, str]]]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    files, weights = read_weight_map(found.folder, index)
    tree: dict[str, Any] = {}
    refused: dict[str, str] = {}
    there: dict[str, str] = {}
    for name, file in files.items():
        more, missed = read(file, found.under)
        for key in (*more, *(key[len(found.under) + 1 :] for key in missed)):
            if key in there:
                raise DamagedError(index.url, f"{there[key]} and {name} both have it", key)
            there[key] = name
        tree.update(more)
        refused.update(missed)
    check_weight_map(index, weights, there)
    return f"{counted(len(files), 'file')} and {index.name}", tree, refused


def _read_safetensors(file: File, under: str) -> tuple[dict[str, Any], dict[str, str]]:
    return _of_header(read_header(file), under)


def _read_torch(file: File, under: str) -> tuple[dict[str, Any], dict[str, str]]:
    tree, refused = read_torch_file(file, under)
    return (tree if type(tree) is dict else {}), refused


def _of_header(header: Header, under: str) -> tuple[dict[str, Any], dict[str, str]]:
    return dict(header.tensors), {f"{under}.{name}": why for name, why in header.refused.items()}


FORMATS: list[Read] = [_safetensors, _torch, read_dcp, _folder]
"""Asked one after the other. Another format is another entry."""
