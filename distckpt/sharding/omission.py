"""What ranks leave out of a checkpoint: each says it of itself, with its description; together it must make sense."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import pyarrow as pa

from distckpt.errors import PlanError
from distckpt.format.json.left_out import Base, LeftOut
from distckpt.format.tree.keys import hint

OMISSION = b"distckpt.omission"
"""The metadata of a description that say what its rank leaves out."""

LEFT_OUT = b"distckpt.left_out"
"""The metadata of a plan that say what all ranks leave out."""


class Omission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank leaves out: what was asked for, which of ``exclude`` it has ever had, and the ``keys`` that are frozen,
    which a ``base`` has, if one was named."""

    exclude: tuple[str, ...]
    matched: tuple[str, ...]
    only_trainable: bool
    keys: tuple[str, ...]
    base: Base | None = None

    def encode(self) -> bytes:
        """As metadata."""
        return msgspec.json.encode(self)


def omission_of(table: pa.Table) -> Omission | None:
    """What the description says that its rank leaves out. ValueError for what ``build_description`` has not written."""
    data = (table.schema.metadata or {}).get(OMISSION)
    try:
        return None if data is None else msgspec.json.decode(data, type=Omission)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a description: what it leaves out cannot be read: {error}") from error


def agreed(number: int | None, omissions: Sequence[Omission | None], saved: Collection[str]) -> LeftOut:
    """What all ranks leave out together, of a checkpoint that has the ``saved`` keys.

    PlanError, about checkpoint ``number``, if they were not asked to leave out the same, and for an ``exclude`` of which
    none of them has ever had a key: it is mistyped, and more would be saved than was meant.
    """
    first, *others = (omission or Omission((), (), False, ()) for omission in omissions)
    for rank, other in enumerate(others, 1):
        if (other.exclude, other.only_trainable) != (first.exclude, first.only_trainable):
            said = [f"exclude={list(one.exclude)}, only_trainable={one.only_trainable}" for one in (first, other)]
            message = f"rank 0 says {said[0]}, and rank {rank} {said[1]}. Make the Checkpoint alike on all ranks"
            raise PlanError(number, "what is left out", [0, rank], message)
    _check_bases(number, [one.base for one in (first, *others)])
    matched = {text for one in (first, *others) for text in one.matched}
    for text in first.exclude:
        if text not in matched:
            message = f"it leaves out nothing, as no key is or begins with it{hint(text, saved)}"
            raise PlanError(number, f"exclude={text!r}", range(len(omissions)), message)
    written = frozenset(saved)
    keys = dict.fromkeys(key for one in (first, *others) for key in one.keys if key not in written)
    return LeftOut(first.exclude, first.only_trainable, tuple(keys), first.base)


def _check_bases(number: int | None, bases: Sequence[Base | None]) -> None:
    for rank, base in enumerate(bases):
        if (base and base.digest) != (bases[0] and bases[0].digest):
            said = [one.path if one else "nothing" for one in (bases[0], base)]
            message = (
                f"rank 0 has frozen parameters from {said[0]}, and rank {rank} from {said[1]}: give all ranks the same"
            )
            raise PlanError(number, "frozen_from", [0, rank], message)


def with_left_out(table: pa.Table, left_out: LeftOut | None) -> pa.Table:
    """The table of a plan, with what is left out."""
    return table if left_out is None else table.replace_schema_metadata({LEFT_OUT: msgspec.json.encode(left_out)})


def left_out_of(table: pa.Table) -> LeftOut | None:
    """What is left out under the plan of this table; None if the plan has all there is."""
    data = (table.schema.metadata or {}).get(LEFT_OUT)
    return None if data is None else msgspec.json.decode(data, type=LeftOut)
