"""Filling live objects from a checkpoint, whatever number of ranks wrote it: only what this rank holds is read.

First it is found out how objects and checkpoint match, which changes nothing; then whoever asked decides; then the
objects are filled.
"""

from __future__ import annotations

from distckpt.directory.locate import Located
from distckpt.errors import MismatchError
from distckpt.format.arrow.index import Index
from distckpt.format.tree.tree import DictStep, Path, RankStep, decode_path
from distckpt.state.kinds import kinds_of
from distckpt.state.match import Match, Saved, Values
from distckpt.state.objects import SAVE_COUNTER, NamedObjects
from distckpt.state.status import LoadStatus


class Filler:
    """One restore of one checkpoint into the objects of another. Made, it knows how they match; nothing is changed yet.

    Raises ResizeError, and DamagedError for plain values that are not as they were written.
    """

    def __init__(
        self, checkpoint: NamedObjects, where: Located, index: Index, rank: int, world_size: int, partial: bool = False
    ) -> None:
        self._where = where
        paths = {key: decode_path(path, where.path) for key, path in zip(index.names, index.paths, strict=True)}
        saved = Saved(where, index, (), paths, {key: key for key in paths})
        parts = saved.by_step()
        self._match = match = Match(where, index, partial)
        for name, kind in kinds_of(checkpoint, rank, world_size).items():
            kind.match(match, parts.get(DictStep(name), saved.below(DictStep(name))))
        if SAVE_COUNTER in saved:
            match.value(saved, SAVE_COUNTER)
            match.afterwards(lambda values: setattr(checkpoint, SAVE_COUNTER, int(values[SAVE_COUNTER])))
        self._values: Values = match.look()
        self._unclaimed = [key for key in paths if key not in match.claimed and not _of_other_rank(paths[key], rank)]

    @property
    def misfits(self) -> dict[str, str]:
        """Keys that are on both sides and do not fit, and why."""
        return dict(self._match.misfits)

    def status(self) -> LoadStatus:
        """How keys match."""
        matched = len(self._match.claimed - {SAVE_COUNTER} - self._match.misfits.keys())
        return LoadStatus(self._where.path, self._match.missing, self._unclaimed, matched)

    def fill(self) -> LoadStatus:
        """Fill the objects, every byte checked before it counts. After a DamagedError they hold a mixture."""
        self._match.perform(self._values)
        return self.status()


def restore_objects(checkpoint: NamedObjects, where: Located, index: Index, rank: int, world_size: int) -> LoadStatus:
    """Fill every object of ``checkpoint``. See Checkpoint.restore for the promise and the errors."""
    filler = Filler(checkpoint, where, index, rank, world_size)
    if filler.misfits:
        raise MismatchError(where.path, (), (), filler.misfits)
    return filler.fill()


def _of_other_rank(path: Path, rank: int) -> bool:
    return len(path) > 1 and isinstance(path[1], RankStep) and path[1].rank != rank
