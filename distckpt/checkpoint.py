"""What a user saves and restores: Checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.directory.locate import Located, locate, read_index
from distckpt.directory.log import read_tail
from distckpt.format import names
from distckpt.manager import CheckpointManager
from distckpt.state.filler import restore_objects
from distckpt.state.objects import NamedObjects, PerRank, RandomState
from distckpt.state.selection import Rename, Selection
from distckpt.state.status import LoadStatus, describe
from distckpt.state.stored import Committed, Stored
from distckpt.storage import above, canonical, open_store, placed
from distckpt.world import find_rank

__all__ = ["Checkpoint", "LoadStatus", "PerRank", "RandomState"]

logger = logging.getLogger(__name__)

ONE_OFF = "saved"
"""The name of a checkpoint that has a directory of its own."""


class Checkpoint(NamedObjects):
    """Named objects that are saved and restored together.

    Each keyword is a module, an optimizer, anything with ``state_dict`` and ``load_state_dict``, a PerRank, nested
    dicts and lists of tensors and plain values, a tensor, a NumPy array or a plain value. The names begin the keys;
    the objects are attributes of the checkpoint, where a restored plain value is found too. Optimizer state is keyed
    by parameter name if a module among the objects holds the parameters.

    ``save_counter`` counts saves and is saved itself.

    ``exclude`` leaves out of all saves what keys begin with, up to a ``.`` or ``@``, as ``select`` of a restore takes it:
    ``exclude=["ema", "model.base"]``; of a PerRank without its rank. A text that no rank has a key for is refused at the
    first save. What is excluded is not expected by restores either, and stays as it is, also if the checkpoint has it.

    ``only_trainable`` leaves out parameters with ``requires_grad=False``, and their state in optimizers: of all modules,
    or of those that it names, with True of none that would be left out whole, which is refused. Buffers are saved, as
    they change without gradients. A restore takes of frozen parameters what the checkpoint has, and what it has not stays.
    Those that were trained at any time, or restored, are saved from then on, since nothing else need have what they hold:
    get a base by a Checkpoint of its own. A frozen parameter that the program changes by itself (an average, a momentum
    encoder) is none to leave out.

    ``frozen_from``, a path as ``restore`` takes it, is the checkpoint that has what ``only_trainable`` leaves out. Restores
    read frozen parameters from there, if the checkpoint lacks them, every byte checked; so does ``restore_or_initialize``
    where there is nothing to restore yet. Checkpoints name it, with the SHA-256 of what its tensors are, and a restore
    beside another one is refused by a RestoreError. A save of frozen parameters that were not read from there is refused.
    ``select`` and ``rename`` read nothing from there. Saves tag it, so that no retention takes it.

    A checkpoint says what was left out of it. All ranks leave out the same.
    """

    def restore(
        self,
        path: str | os.PathLike[str] | None,
        storage_options: Mapping[str, Any] | None = None,
        partial: bool = False,
        *,
        select: str | Sequence[str] | None = None,
        rename: Rename | None = None,
        progress: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        data: str | os.PathLike[str] | None = None,
        data_options: Mapping[str, Any] | None = None,
    ) -> LoadStatus:
        """Fill the objects in place from the checkpoint at ``path``, every byte checked before it counts.

        Reads only what this rank holds, whatever number of ranks wrote the checkpoint; talks to nobody. Missing and
        unexpected keys are reported by the status and, unless ``partial``, in the log; keys that do not fit are
        refused, or with ``partial`` reported by the status and left as they are. None, which is the latest checkpoint
        of a fresh directory, restores nothing: for the status all objects are missing then.

        ``select`` restores only what these keys of the checkpoint begin with, ``"model"`` say, and leaves all else as it
        is. ``rename`` maps what keys of the checkpoint begin with to what they are called here, or is a function from key
        to key; None leaves a key out: ``restore(other_run, select="model.encoder", rename={"model.encoder": "encoder"})``.
        ``progress`` has rank 0 show on its terminal how far it has come. ``cache_dir``, ``data`` and ``data_options`` are
        as for ``distckpt.open``.

        Raises CheckpointNotFoundError, DamagedError, ResizeError, and MismatchError, before anything is changed, for
        keys that do not fit and when objects and checkpoint have nothing in common; KeyError for a selector that no key
        begins with. With ``partial`` all bytes are checked before anything is changed, which costs one more read of
        them. Without, they are checked as they are read: after a DamagedError tensors of the objects hold anything, so
        restore a checkpoint that has all their keys, or make them anew.
        """
        if path is None:
            return LoadStatus("no checkpoint", list(self.objects), ())
        where = locate(path, placed(storage_options, cache_dir=cache_dir, data=data, data_options=data_options))
        return fill(self, where, partial, select, rename, progress)

    def save(
        self,
        file_prefix: str | os.PathLike[str],
        options: object = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Save once, without a manager: all ranks call it alike. Returns ``<file_prefix>-<save_counter>`` once it is
        committed there.

        That is a directory of its own, which ``restore``, ``read``, ``load`` and ``open`` take. ``save_counter`` counts
        up. ``options`` are taken so that calls written for TensorFlow work.

        Raises what a save raises, and ValueError for a place that belongs to something else. Whoever saves again and
        again has a CheckpointManager, whose ``save`` does not wait, and which makes room.
        """
        number = self.save_counter + 1
        prefix = os.fspath(file_prefix)
        if prefix.endswith(("/", os.sep)) or above(canonical(prefix)) is None:
            raise ValueError(
                f"file_prefix {prefix!r} is a place and no beginning of a name in one, to which -{number} would be added: give "
                f"{prefix.rstrip('/')}/ckpt, say"
            )
        return self._commit(f"{prefix}-{number}", number, storage_options)

    def write(
        self,
        file_prefix: str | os.PathLike[str],
        options: object = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> str:
        """As ``save``, but under ``file_prefix`` itself, and ``save_counter`` stays. What was written there before makes
        room once this is committed."""
        counter = self.save_counter
        try:
            self.save_counter = counter - 1  # which a save counts up, and is saved with
            return self._commit(os.fspath(file_prefix), 0, storage_options)
        finally:
            self.save_counter = counter

    def read(
        self,
        save_path: str | os.PathLike[str],
        options: object = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> LoadStatus:
        """TensorFlow's name for ``restore`` of what ``write`` has written. It takes any checkpoint."""
        return self.restore(save_path, storage_options)

    def _commit(self, directory: str, number: int, storage_options: Mapping[str, Any] | None) -> str:
        _check_ours(directory, storage_options)
        with _Once(self, directory, 1, checkpoint_name=ONE_OFF, storage_options=storage_options) as manager:
            pending = manager.save(number)
            pending.result()
            return manager.directory


class _Once(CheckpointManager):
    """Saves one checkpoint, of which nobody keeps statistics."""

    _keeps_stats = False


def fill(
    checkpoint: NamedObjects,
    where: Located,
    partial: bool = False,
    select: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    progress: bool = False,
) -> LoadStatus:
    """Fill the objects from the attempt at ``where``: see Checkpoint.restore, which finds that by a path."""
    return fill_from(checkpoint, Committed(where, read_index(where)), partial, select, rename, progress)


def fill_from(
    checkpoint: NamedObjects,
    stored: Stored,
    partial: bool = False,
    select: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    progress: bool = False,
) -> LoadStatus:
    """The same from whatever holds keys and tensors."""
    rank, world_size = find_rank()
    selection = Selection.of(select, rename)
    status = restore_objects(checkpoint, stored, rank, world_size, partial, selection, progress)
    if not partial and (status.missing or status.unexpected):
        logger.warning("%s", describe(status))
    return status


def _check_ours(directory: str, storage_options: Mapping[str, Any] | None) -> None:
    """ValueError if a run saves to this directory, or it is inside of one: there a manager has its say."""
    store = open_store(directory, storage_options)
    directory_above, name = above(store.url) or ("", "")
    head = read_tail(store).head
    others = head.pages or [record for record in head.newest_first() if record.name != ONE_OFF]
    inside = names.parse_checkpoint(name) and read_tail(open_store(directory_above, storage_options)).entry is not None
    if others or inside:
        raise ValueError(
            f"{store.url} {'has checkpoints of a run' if others else 'is inside of the directory of a run'}, whose "
            "manager alone saves there. Give another place"
        )
