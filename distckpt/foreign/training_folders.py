"""What Accelerate, and the Trainer of Transformers, save beside the weights: one file for each object of the training."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.contents import Contents, below
from distckpt.foreign.dcp_folder import METADATA, read_dcp
from distckpt.foreign.files import File, Folder, Found
from distckpt.foreign.torch_file import is_torch_file, read_torch_file
from distckpt.format.others import FSDP

MAX_STATE_BYTES = 64 << 20

PARTS: Mapping[str, str] = {
    "optimizer.bin": "optimizer",
    "optimizer.pt": "optimizer",
    "scheduler.bin": "scheduler",
    "scheduler.pt": "scheduler",
    "scaler.pt": "scaler",
    "sampler.bin": "sampler",
    "dl_state_dict.bin": "loader",
    "rng_state.pth": "rng_state",
}
"""The files, and what we call what they hold. Of several they are numbered: ``optimizer_1.bin``."""

RANKS: Mapping[str, str] = {
    "random_states_{}.pkl": "random_states_{}",
    "rng_state_{}.pth": "rng_state_{}",
    "custom_checkpoint_{}.pkl": "custom_{}",
}
"""Those that are numbered from 0, one a rank or an object."""

UNREAD = "training_args.bin"
STATE = "trainer_state.json"

_MODELS = ("model_{}.safetensors", "pytorch_model_{}.bin", f"{FSDP}_{{}}.bin")
"""The second model, which has the number 1, and those after it."""

_MODEL_FOLDER = re.compile(rf"{FSDP}_\d+|pytorch_model(_\d+)?")
"""Those of FSDP, and of DeepSpeed."""

_OPTIMIZER_FOLDER = "optimizer_{}"
_OF_ONE_RANK = re.compile(rf"({FSDP}|optimizer)(_\d+)?_rank\d+\.bin")
MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Parts:
    """All but the weights of such a folder. ``sharded`` is what lies there in folders of its own."""

    kind: str
    tree: dict[str, Any]
    sharded: tuple[Contents, ...]
    refused: dict[str, str]
    notes: tuple[str, ...]
    number: int | None


def read_sharded(found: Found, title: str, own: str, name: str) -> Contents | None:
    """What DCP has written into the folder ``title`` of this one, where it is called ``own``, below ``name``.

    None if there is no such folder. Of one that is not whole, or is not on this host, all is refused.
    """
    contents = read_dcp(Found(found.folder.inside(title), None, own))
    if contents is not None:
        return below(contents, own, name)
    if title not in found.folder.names():
        return None
    is_remote = "://" in found.folder.url
    why = "is read on this host only: copy it here" if is_remote else f"has no {METADATA}: no save into it was finished"
    return Contents("", found.path, {}, {}, {}, {name: f"{title} {why}"})


def read_parts(found: Found, what: str) -> Parts | None:
    """What there is beside the weights, which are in ``what``; None if it is a folder of weights alone."""
    tree: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, file in _files(found):
        if not is_torch_file(file):
            refused[name] = f"{file.name} is no file of torch.save, but a plain pickle"
            continue
        part, missed = read_torch_file(file, name)
        refused.update(missed)
        if name not in missed:
            tree[name] = part
    sharded = {
        number: read_sharded(found, _OPTIMIZER_FOLDER.format(number), "optimizer", _numbered_name("optimizer", number))
        for number in sorted({0, *_listed(found.folder, _OPTIMIZER_FOLDER)})
        if _numbered_name("optimizer", number) not in (*tree, *refused)
    }
    others = [*_other_models(found.folder, what), *_other_optimizers(found.folder, sharded)]
    if not (tree or refused or others or any(sharded.values())):
        return None
    state = found.folder.find(STATE)
    said = {} if state is None else _json(state)
    if said:
        tree["trainer_state"] = said
    step = said.get("global_step")
    if found.folder.find(UNREAD) is not None:
        others.insert(0, (UNREAD, "it has the program's arguments, which only unpickling could read"))
    notes = tuple(f"{name} was not looked at: {why}" for name, why in others)
    number = step if type(step) is int and step >= 0 else None
    whole = tuple(part for part in sharded.values() if part is not None)
    return Parts("training folder", tree, whole, refused, notes, number)


def _other_models(folder: Folder, what: str) -> list[tuple[str, str]]:
    """The models that are there beside the one in ``what``, each with the reason why it is not read."""
    found = [file.name for title in _MODELS for _, file in _numbered(folder, title, 1)]
    found += [title for title in (f"{FSDP}.bin",) if title != what and folder.find(title) is not None]
    found += sorted(name for name in folder.names() if _MODEL_FOLDER.fullmatch(name) and name != what)
    return [(name, "give each model a folder, or a path, of its own") for name in found]


def _other_optimizers(folder: Folder, read: Mapping[int, Contents | None]) -> list[tuple[str, str]]:
    """Folders of an optimizer that is a file too, and what each rank has saved for itself alone."""
    numbers = sorted(set(_listed(folder, _OPTIMIZER_FOLDER)) - read.keys())
    others = [
        (_OPTIMIZER_FOLDER.format(number), "that optimizer has a file here too, which was read") for number in numbers
    ]
    ranks = (name for name in folder.names() if _OF_ONE_RANK.fullmatch(name))
    return others + [(name, "it has one rank's part, and nothing says of what") for name in sorted(ranks)]


def _files(found: Found) -> Iterator[tuple[str, File]]:
    for title, name in PARTS.items():
        stem, _, kind = title.rpartition(".")
        first = found.folder.find(title)
        if first is not None:
            yield name, first
        for number, file in _numbered(found.folder, f"{stem}_{{}}.{kind}", 1):
            yield _numbered_name(name, number), file
    for title, name in RANKS.items():
        for number, file in _numbered(found.folder, title, 0):
            yield name.format(number), file


def _numbered(folder: Folder, title: str, first: int) -> Iterator[tuple[int, File]]:
    """The files of that title by number, from ``first`` on, of which some may be missing: rank 1 alone, say.

    Links are not listed, as all files of a cache may be; so those are found up to the first that is missing.
    """
    linked = itertools.takewhile(lambda number: folder.find(title.format(number)) is not None, range(first, MOST))
    for number in sorted({*linked, *_listed(folder, title)}):
        file = folder.find(title.format(number)) if number >= first else None
        if file is not None:
            yield number, file


def _listed(folder: Folder, title: str) -> list[int]:
    """The numbers of the files or folders of that title."""
    before, after = map(re.escape, title.split("{}"))
    found = (re.fullmatch(rf"{before}(0|[1-9]\d{{0,8}}){after}", name) for name in folder.names())
    return sorted(int(match[1]) for match in found if match)


def _numbered_name(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _json(file: File) -> dict[str, Any]:
    try:
        said = json.loads(file.content(MAX_STATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedError(file.url, f"no sound JSON: {error}") from error
    return said if isinstance(said, dict) else {}
