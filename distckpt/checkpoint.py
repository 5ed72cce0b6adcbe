"""What a user saves and restores: Checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.directory.locate import locate, read_index
from distckpt.state.filler import restore_objects
from distckpt.state.objects import NamedObjects, PerRank, RandomState
from distckpt.state.selection import Rename, Selection
from distckpt.state.status import LoadStatus, describe
from distckpt.world import find_rank

__all__ = ["Checkpoint", "LoadStatus", "PerRank", "RandomState"]

logger = logging.getLogger(__name__)


class Checkpoint(NamedObjects):
    """Named objects that are saved and restored together.

    Each keyword is a module, an optimizer, anything with ``state_dict`` and ``load_state_dict``, a PerRank, nested
    dicts and lists of tensors and plain values, a tensor, a NumPy array or a plain value. The names begin the keys;
    the objects are attributes of the checkpoint, where a restored plain value is found too. Optimizer state is keyed
    by parameter name if a module among the objects holds the parameters.

    ``save_counter`` counts saves and is saved itself.
    """

    def restore(
        self,
        path: str | os.PathLike[str] | None,
        storage_options: Mapping[str, Any] | None = None,
        partial: bool = False,
        *,
        select: str | Sequence[str] | None = None,
        rename: Rename | None = None,
    ) -> LoadStatus:
        """Fill the objects in place from the checkpoint at ``path``, every byte checked before it counts.

        Reads only what this rank holds, whatever number of ranks wrote the checkpoint; talks to nobody. Missing and
        unexpected keys are reported by the status and, unless ``partial``, in the log; keys that do not fit are
        refused, or with ``partial`` reported by the status and left as they are. None, which is the latest checkpoint
        of a fresh directory, restores nothing: for the status all objects are missing then.

        ``select`` restores only what these keys of the checkpoint begin with, ``"model"`` say, and leaves all else as it
        is. ``rename`` maps what keys of the checkpoint begin with to what they are called here, or is a function from key
        to key; None leaves a key out: ``restore(other_run, select="model.encoder", rename={"model.encoder": "encoder"})``.

        Raises CheckpointNotFoundError, DamagedError, ResizeError, and MismatchError, before anything is changed, for
        keys that do not fit and when objects and checkpoint have nothing in common; KeyError for a selector that no key
        begins with. After a DamagedError the objects
        hold a mixture: restore another checkpoint.
        """
        if path is None:
            return LoadStatus("no checkpoint", list(self.objects), ())
        where = locate(path, storage_options)
        rank, world_size = find_rank()
        selection = Selection.of(select, rename)
        status = restore_objects(self, where, read_index(where), rank, world_size, partial, selection)
        if not partial and (status.missing or status.unexpected):
            logger.warning("%s", describe(status))
        return status
