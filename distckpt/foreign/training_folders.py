"""What Accelerate, and the Trainer of Transformers, save beside the weights: one file for each object of the training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.errors import DamagedError
from distckpt.foreign.files import File, Found
from distckpt.foreign.torch_file import is_torch_file, read_torch_file

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
OTHERS = ("model_1.safetensors", "pytorch_model_1.bin", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")
MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Parts:
    """All but the weights of such a folder."""

    kind: str
    tree: dict[str, Any]
    refused: dict[str, str]
    notes: tuple[str, ...]
    number: int | None


def read_parts(found: Found) -> Parts | None:
    """What there is beside the weights; None if it is a folder of weights alone."""
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
    if not tree and not refused:
        return None
    state = found.folder.find(STATE)
    said = {} if state is None else _json(state)
    if said:
        tree["trainer_state"] = said
    step = said.get("global_step")
    notes = [
        f"{name} was not looked at: {why}"
        for name, why in (
            (UNREAD, "it has the program's arguments, which only unpickling could read"),
            *((name, "give each model a folder, or a path, of its own") for name in OTHERS),
        )
        if found.folder.find(name) is not None
    ]
    number = step if type(step) is int and step >= 0 else None
    return Parts("training folder", tree, refused, tuple(notes), number)


def _files(found: Found) -> Iterator[tuple[str, File]]:
    for title, name in PARTS.items():
        stem, _, kind = title.rpartition(".")
        for number in range(MOST):
            file = found.folder.find(title if not number else f"{stem}_{number}.{kind}")
            if file is None:
                break
            yield (name if not number else f"{name}_{number}"), file
    for title, name in RANKS.items():
        for number in range(MOST):
            file = found.folder.find(title.format(number))
            if file is None:
                break
            yield name.format(number), file


def _json(file: File) -> dict[str, Any]:
    try:
        said = json.loads(file.content(MAX_STATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedError(file.url, f"no sound JSON: {error}") from error
    return said if isinstance(said, dict) else {}
