"""A rank whose files go elsewhere than to the store that the coordinator sees."""

from __future__ import annotations

import distckpt
from distckpt.storage import Store


def write_to(manager: distckpt.CheckpointManager, store: Store | None) -> None:
    """From now on this rank writes its shards to ``store``; None: to the manager's own again."""
    manager._saver._background._store = store if store is not None else manager._store
