"""Filling live objects from a checkpoint, whatever number of ranks wrote it: only what this rank holds is read.

First it is found out how objects and checkpoint match, which changes nothing; then whoever asked decides; then all of
it is read, tensors into the memory that they have, and when that has gone well the objects are handed the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import numpy as np
import torch

from distckpt.errors import MismatchError
from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.tree import DictStep, Path, RankStep, decode_path, key_of
from distckpt.state.base import Completed, Part, base_of, check_base
from distckpt.state.kind import Kind
from distckpt.state.kinds import kinds_of, surroundings_of
from distckpt.state.leaving import frozen_parameters, leaving_of
from distckpt.state.match import Match, Saved, Values
from distckpt.state.objects import SAVE_COUNTER, NamedObjects, is_stateful, note_of_base, note_trained, wrapped_in
from distckpt.state.optimizer import STATE, OptimizerState
from distckpt.state.selection import EVERYTHING, Selection, as_there, joined
from distckpt.state.status import LoadStatus
from distckpt.state.stored import Stored
from distckpt.state.tree import TreeState
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import human_bytes
from distckpt.transfer.reader import ReadStats

logger = logging.getLogger(__name__)


class Filler:
    """One restore of one checkpoint into the objects of another. Made, it knows how they match; nothing is changed yet.

    ``shown`` has rank 0 show on its terminal how far it has come.

    What is frozen in objects that say where that comes from, and not in the checkpoint, comes from there.

    Raises ResizeError, DamagedError for plain values that are not as they were written, KeyError for a selector of no
    key, ValueError for a renaming that makes one key of two, RestoreError for a base that is not the one that was there.
    """

    def __init__(
        self,
        checkpoint: NamedObjects,
        stored: Stored,
        rank: int,
        world_size: int,
        partial: bool = False,
        selection: Selection = EVERYTHING,
        shown: bool = False,
    ) -> None:
        self._began = time.monotonic()
        self._stats: ReadStats | None = None
        self._shown = shown and rank == 0
        self._stored = stored
        texts = stored.texts
        paths = {key: decode_path(text, stored.path) for key, text in texts.items()}
        around = surroundings_of(checkpoint, rank, world_size)
        kinds = kinds_of(checkpoint, around)
        self._checkpoint, self._rank, self._paths = checkpoint, rank, paths
        self._modules = around.modules
        with self._modules.at_rest():
            self._leaving = leaving_of(checkpoint, kinds)
            self._values = self._match_with(kinds, partial, selection)

    def _match_with(self, kinds: Mapping[str, Kind], partial: bool, selection: Selection) -> Values:
        """Find out how the objects match; the values that tell."""
        checkpoint, stored, paths, texts = self._checkpoint, self._stored, self._paths, self._stored.texts
        here, origins = selection.apply(paths, texts, stored.path, self._leaving, self.left_out)
        moved = [key for key, origin in origins.items() if key != origin]
        leaves = _leaves_of(kinds) if moved else {}
        for key in moved:
            path = _with_whole_names(checkpoint, here[key], paths[origins[key]])
            here[key] = as_there(path, leaves.get(key, path))
        here, origins = _by_name(kinds, here, origins)
        self._frozen = frozen_parameters(checkpoint, kinds, self._leaving) if selection == EVERYTHING else frozenset()
        self._borrowed: frozenset[str] = frozenset()
        base = base_of(checkpoint) if self._frozen else None
        if base is not None:
            self._borrowed = self._frozen if base.is_same(stored) else self._frozen - texts.keys()
            check_base(stored, base, self._borrowed)
            part = Part(base.stored, self._borrowed)
            here, origins = {**here, **part.paths()}, {**origins, **{key: key for key in self._borrowed}}
            stored = Completed(stored, part)
        saved = Saved(stored, (), here, origins)
        parts = saved.by_step()
        self._match = match = Match(stored, partial, *selection.askers(self._leaving))
        # Parameters come first: what else holds their memory finds out then whether it was saved with the same content.
        for name in sorted(kinds, key=lambda name: _turn(wrapped_in(checkpoint.objects[name]))):
            kind = kinds[name]
            kind.match(match, parts.get(DictStep(name), saved.nothing(DictStep(name))))
        if SAVE_COUNTER in saved:
            match.value(saved, SAVE_COUNTER)
            match.afterwards(lambda values: setattr(checkpoint, SAVE_COUNTER, int(values[SAVE_COUNTER])))
        values = match.look()
        self._touched = self._leaving.frozen_with(match.claimed - self._borrowed)
        self._names = {origin: key for key, origin in origins.items()}
        return values

    @property
    def path(self) -> str:
        """What people call the checkpoint."""
        return self._stored.path

    @property
    def missing(self) -> list[str]:
        """Keys of the objects that the checkpoint lacks: they stay as they are."""
        return list(self._match.missing)

    @property
    def left_out(self) -> LeftOut | None:
        """What was left out of the checkpoint when it was saved."""
        return self._stored.left_out

    @property
    def misfits(self) -> dict[str, str]:
        """Keys that are on both sides and do not fit, and why."""
        return dict(self._match.misfits)

    @property
    def matched(self) -> int:
        """How many keys of the checkpoint some object takes."""
        lent = self._borrowed - self._paths.keys()
        return len(self._match.claimed - {SAVE_COUNTER} - self._match.misfits.keys() - lent)

    @property
    def bytes_read(self) -> int:
        """Bytes that ``read`` has read."""
        return self._stats.bytes_read if self._stats else 0

    @property
    def unclaimed(self) -> bytes:
        """A bit for each key of the checkpoint, in the order of its index: whether no object here has a place for it."""
        claimed, names = self._match.claimed, self._names
        nobodys = (key in names and names[key] not in claimed for key in self._paths)
        return np.packbits(np.fromiter(nobodys, bool, len(self._paths))).tobytes()

    def keys_of(self, unclaimed: bytes) -> list[str]:
        """The keys whose bits are set."""
        bits = np.unpackbits(np.frombuffer(unclaimed, np.uint8), count=len(self._paths))
        return [key for key, bit in zip(self._paths, bits.tolist(), strict=True) if bit]

    def status(self) -> LoadStatus:
        """How keys match, as far as this rank can tell: state of another rank's own is nothing that it would ask for."""
        unclaimed = self.keys_of(self.unclaimed)
        unexpected = [key for key in unclaimed if not _of_other_rank(self._paths[key], self._rank)]
        match = self._match
        return LoadStatus(self.path, match.missing, unexpected, self.matched, match.misfits, self.left_out)

    def check(self) -> None:
        """Read and check every byte that ``read`` would read, and change nothing. DamagedError names shard and key."""
        with bar(f"checking {self._title}", self._shown) as progress:
            self._match.check_bytes(progress if self._shown else None)

    def read(self) -> None:
        """Read all of it, every byte checked: into tensors where they are, else into new memory.

        After a DamagedError such tensors hold anything; nothing else of the objects has been changed. Those of parameters
        that are not trained are saved from then on, and expected of every checkpoint, as nothing else has what they hold.
        """
        note_trained(self._checkpoint, self._touched)
        with bar(f"restoring {self._title}", self._shown) as progress:
            self._stats = self._match.read(progress if self._shown else None)

    def finish(self) -> LoadStatus:
        """Hand the objects what was read and is not in its place yet."""
        with self._modules.at_rest():
            self._match.finish(self._values)
        note_of_base(self._checkpoint, self._borrowed & self._match.claimed - self._match.misfits.keys())
        if self._checkpoint.frozen_from is None and self.left_out is not None and self.left_out.base is not None:
            level = logging.WARNING if self._rank == 0 else logging.DEBUG
            logger.log(
                level,
                "%s was saved beside the frozen parameters of %s: those of these objects stay as they are, and nobody knows "
                "whether they are the same. Give frozen_from to have them read and compared",
                self.path,
                self.left_out.base.path,
            )
        if self._touched and self.left_out is None and self._rank == 0:
            logger.warning(
                "%s has %d keys of parameters that are not trained here. They are saved from now on, as nothing else may have "
                "them: get a base by a Checkpoint of its own, without only_trainable, if that is not meant",
                self.path,
                len(self._touched),
            )
        level = logging.INFO if self._rank == 0 else logging.DEBUG
        seconds, nbytes = time.monotonic() - self._began, human_bytes(self.bytes_read)
        logger.log(level, "%s restored in %.2f s: %s read by rank %d", self.path, seconds, nbytes, self._rank)
        return self.status()

    @property
    def _title(self) -> str:
        return self.path.rpartition("/")[2]


def restore_objects(
    checkpoint: NamedObjects,
    stored: Stored,
    rank: int,
    world_size: int,
    partial: bool = False,
    selection: Selection = EVERYTHING,
    shown: bool = False,
) -> LoadStatus:
    """Fill every object of ``checkpoint``. See Checkpoint.restore for the promise and the errors."""
    filler = Filler(checkpoint, stored, rank, world_size, True, selection, shown)
    filler.status().assert_nontrivial_match()
    if filler.misfits and not partial:
        raise MismatchError(stored.path, (), (), filler.misfits)
    if partial:
        filler.check()
    filler.read()
    return filler.finish()


def start_from_base(checkpoint: NamedObjects, rank: int, world_size: int) -> None:
    """Fill what is frozen from where the objects say that it comes from, if they do, as there is no checkpoint to restore."""
    base = base_of(checkpoint)
    if base is not None:
        filler = Filler(checkpoint, Part(base.stored, frozenset()), rank, world_size)
        filler.read()
        filler.finish()


def _by_name(
    kinds: Mapping[str, Kind], paths: Mapping[str, Path], origins: Mapping[str, str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Paths by the keys here, and of each its key where it was saved, with the state of parameters by their names here."""
    parts: dict[str, dict[str, Path]] = {}
    for key, path in paths.items():
        parts.setdefault(str(path[0]), {})[key] = path
    moved: dict[str, Path] = {}
    for name, part in parts.items():
        kind = kinds.get(name)
        if isinstance(kind, OptimizerState):
            moved |= kind.by_name(part)
    now = {key: key_of(moved[key]) if key in moved else key for key in paths}
    return {now[key]: moved.get(key, path) for key, path in paths.items()}, {now[key]: origins[key] for key in paths}


def _leaves_of(kinds: Mapping[str, Kind]) -> dict[str, Path]:
    """The paths of all that containers of the objects have, by key."""
    trees = (kind for kind in kinds.values() if isinstance(kind, TreeState))
    return {key: path for tree in trees for key, path in tree.paths().items()}


def _with_whole_names(checkpoint: NamedObjects, path: Path, before: Path) -> Path:
    """A renamed path as the object has it, of whose steps one may be the name of a parameter."""
    owner = wrapped_in(checkpoint.objects.get(str(path[0])))
    if isinstance(owner, torch.nn.Module):
        return joined(path, 1, before)
    if isinstance(owner, torch.optim.Optimizer) and path[1:2] == (DictStep(STATE),):
        return joined(path, 2, before)
    return path


def _turn(obj: object) -> int:
    return 0 if isinstance(obj, torch.nn.Module) else 1 if is_stateful(obj) else 2


def _of_other_rank(path: Path, rank: int) -> bool:
    return len(path) > 1 and isinstance(path[1], RankStep) and path[1].rank != rank
