"""Rank functions that restore a checkpoint of which one rank's part is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import distckpt


class Remembering:
    """Tells what it was given, each time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded.append(state["number"])


def _objects(number: int) -> dict[str, Any]:
    """A tree that has grown when number 2 is saved, and something of each rank's own."""
    tree: dict[str, Any] = {"seen": number}
    if number == 2:
        tree["more"] = torch.full((3,), 2.0)
    return {
        "weights": torch.full((1000,), float(number)),
        "tree": tree,
        "own": distckpt.PerRank({"cursor": torch.full((4,), float(number)), "seen": [number]}),
        "remembering": Remembering(number),
    }


def save(directory: str, number: int, only: Sequence[str] = ()) -> None:
    """Save what number ``number`` holds."""
    objects = {name: obj for name, obj in _objects(number).items() if not only or name in only}
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), directory) as manager:
        manager.save(number)


def restore(directory: str, partial: bool) -> dict[str, Any]:
    """Restore the newest good one, and tell what is there then."""
    objects = _objects(-1)
    tree, own = objects["tree"], objects["own"].obj
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), directory) as manager:
        path = manager.restore(partial=partial)
    return {
        "path": path,
        "weights": objects["weights"].unique().tolist(),
        "tree": tree,
        "cursor": own["cursor"].unique().tolist(),
        "loaded": objects["remembering"].loaded,
    }
