"""What Lightning's ``.ckpt`` files have, under the names that DistckptCallback gives the same things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VERSION = "pytorch-lightning_version"
_OBJECTS = {"optimizer_states": "optimizer", "lr_schedulers": "lr_scheduler"}
REST = "lightning"
"""Where all that is which is no object of its own: loops, callbacks, hyperparameters."""


def is_lightning(tree: Any) -> bool:
    """Whether Lightning has made it."""
    return type(tree) is dict and _VERSION in tree and "state_dict" in tree


def lightning_tree(
    tree: Mapping[str, Any], refused: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], int | None]:
    """The tree under our names, what could not be read likewise, and the number of the step."""
    named: dict[str, Any] = {"model": tree["state_dict"]}
    for theirs, ours in _OBJECTS.items():
        states = tree.get(theirs, [])
        if type(states) is list:
            named.update({ours if len(states) == 1 else f"{ours}_{at}": state for at, state in enumerate(states)})
    taken = {"state_dict", *(name for name in _OBJECTS if type(tree.get(name)) is list)}
    named[REST] = {key: value for key, value in tree.items() if key not in taken}
    missed = {
        f"model{key[len('state_dict') :]}" if key.startswith("state_dict.") else f"{REST}.{key}": why
        for key, why in refused.items()
    }
    step = tree.get("global_step")
    return named, missed, step if type(step) is int and step >= 0 else None
