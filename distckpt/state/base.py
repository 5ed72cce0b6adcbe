"""Where frozen parameters come from: another checkpoint, which has them while those of a run have only the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.directory.locate import locate, read_index
from distckpt.errors import RestoreError
from distckpt.errors.base import some
from distckpt.format.arrow.digest import digest_of
from distckpt.format.json.left_out import Base, LeftOut
from distckpt.format.tree.tree import Path, decode_path
from distckpt.sharding.match import Wanted
from distckpt.state.objects import NamedObjects, keep_base, kept_base
from distckpt.state.stored import Committed, Stored, Targets
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import ReadStats

_NOTHING = ReadStats(0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Opened:
    """The checkpoint that frozen parameters come from, read as far as its index."""

    stored: Committed
    digest: str

    @property
    def name(self) -> Base:
        """As manifests name it."""
        return Base(self.stored.path, self.digest)

    def is_same(self, stored: Stored) -> bool:
        """Whether ``stored`` is this very checkpoint, or a copy of it."""
        return isinstance(stored, Committed) and stored.where.manifest.attempt == self.stored.where.manifest.attempt


def base_of(checkpoint: NamedObjects) -> Opened | None:
    """What ``frozen_from`` of the objects names, opened once; None if it names nothing. Raises what ``locate`` raises."""
    if checkpoint.frozen_from is None:
        return None
    known = kept_base(checkpoint)
    if not isinstance(known, Opened):
        where = locate(checkpoint.frozen_from)
        index = read_index(where)
        known = Opened(Committed(where, index), digest_of(index))
        keep_base(checkpoint, known)
    return known


def check_base(stored: Stored, base: Opened, frozen: Collection[str]) -> None:
    """RestoreError if ``stored`` was saved beside another base, or the base lacks one of the ``frozen`` keys."""
    told = stored.left_out.base if stored.left_out is not None else None
    if told is not None and told.digest != base.digest:
        raise RestoreError(
            f"{stored.path} was saved beside the frozen parameters of {told.path} ({told.digest[:16]}), and frozen_from="
            f"{base.stored.path} has others ({base.digest[:16]}), or in other chunks: give that one, or a copy of it"
        )
    lacking = [key for key in frozen if key not in base.stored.index]
    if lacking:
        raise RestoreError(
            f"{base.stored.path} lacks {some(lacking, most=3)}, which are frozen here and so are to come from it by "
            "frozen_from: save a Checkpoint of this very module there once, without only_trainable"
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Some ``keys`` of a checkpoint, and nothing else of it."""

    whole: Committed
    keys: frozenset[str]

    @property
    def path(self) -> str:
        """See Stored."""
        return self.whole.path

    @property
    def world_size(self) -> int:
        """See Stored."""
        return self.whole.world_size

    @property
    def left_out(self) -> LeftOut | None:
        """See Stored."""
        return None

    @property
    def texts(self) -> Mapping[str, str]:
        """See Stored."""
        return {key: text for key, text in self.whole.texts.items() if key in self.keys} if self.keys else {}

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """See Stored."""
        return self.whole.layout(key)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """See Stored."""
        return self.whole.values(keys)

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored."""
        return self.whole.read(targets, progress) if targets else _NOTHING

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored."""
        return self.whole.check(targets, progress) if targets else _NOTHING

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        """See Stored."""
        self.whole.fill(wanted, memory)

    def paths(self) -> dict[str, Path]:
        """Of every key its path."""
        return {key: decode_path(text, self.path) for key, text in self.texts.items()}


@dataclass(frozen=True, slots=True)
class Completed:
    """A checkpoint, and what it lacks from a part of another one."""

    own: Stored
    borrowed: Part

    @property
    def path(self) -> str:
        """See Stored."""
        return self.own.path

    @property
    def world_size(self) -> int:
        """See Stored."""
        return self.own.world_size

    @property
    def left_out(self) -> LeftOut | None:
        """See Stored."""
        return self.own.left_out

    @property
    def texts(self) -> Mapping[str, str]:
        """See Stored."""
        return {**self.own.texts, **self.borrowed.texts}

    def layout(self, key: str) -> tuple[str, tuple[int, ...]]:
        """See Stored."""
        return self._of(key).layout(key)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """See Stored. Frozen parameters are none."""
        return self.own.values(keys)

    def read(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored."""
        return _sum([part.read(wanted, progress) for part, wanted in self._parts(targets)])

    def check(self, targets: Targets, progress: Progress | None = None) -> ReadStats:
        """See Stored."""
        return _sum([part.check(wanted, progress) for part, wanted in self._parts(targets)])

    def fill(self, wanted: Sequence[Wanted], memory: Sequence[memoryview]) -> None:
        """See Stored."""
        for part in (self.own, self.borrowed):
            pairs = [pair for pair in zip(wanted, memory, strict=True) if self._of(pair[0].key) is part]
            if pairs:
                part.fill([one for one, _ in pairs], [place for _, place in pairs])

    def _parts(self, targets: Targets) -> list[tuple[Stored, Targets]]:
        borrowed = {key: targets[key] for key in targets if key in self.borrowed.keys}
        own = {key: targets[key] for key in targets if key not in borrowed}
        return [(self.own, own), *([(self.borrowed, borrowed)] if borrowed else [])]

    def _of(self, key: str) -> Stored:
        return self.borrowed if key in self.borrowed.keys else self.own


def _sum(stats: Sequence[ReadStats]) -> ReadStats:
    return ReadStats(
        sum(each.bytes_needed for each in stats),
        sum(each.bytes_read for each in stats),
        sum(each.seconds for each in stats),
    )
