"""Rank functions of a run whose shards lie apart from its log."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import distckpt
from distckpt.errors import DataElsewhereError
from distckpt.storage.node import ranks_here


def saved_and_restored(directory: str, storage_options: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Save three, keep one, restore in a second run; and what a manager is told without ``data``, keyword arguments."""
    rank = dist.get_rank()
    mine = {"weight": torch.full((1 << 10,), float(rank)), "rank": rank}

    def manager(**keywords: Any) -> distckpt.CheckpointManager:
        checkpoint = distckpt.Checkpoint(mine=distckpt.PerRank(mine, on_resize="drop"))
        keywords = {"storage_options": storage_options, "save_timeout": 30, **keywords}
        return distckpt.CheckpointManager(checkpoint, directory, 1, **keywords)

    with manager(**data) as first:
        for number in (1, 2, 3):
            mine["weight"] += 1
            first.save(number)
    mine["weight"] = torch.zeros(1 << 10)
    with manager(**data) as second:
        path = second.restore()
    told = ""
    try:
        with manager() as third:
            third.restore()
    except DataElsewhereError as error:
        told = str(error)
    return {"path": path, "weight": mine["weight"][0].item(), "told": told, "here": ranks_here()}
