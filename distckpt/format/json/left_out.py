"""What was left out of a checkpoint on purpose, as its manifest says it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from distckpt.errors.base import some
from distckpt.format.limits import shown
from distckpt.format.tree.keys import is_among, is_below, without_rank

_DIGEST = re.compile("[0-9a-f]{64}")


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that frozen parameters come from: its ``path``, for people alone, and the ``digest`` of its tensors."""

    path: str
    digest: str


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the objects had and the checkpoint has not, since whoever saved it wanted that.

    ``exclude`` are what the keys begin with that were excluded, up to a ``.`` or ``@``, ranks left out. ``keys`` are
    those of parameters that were not trained, and of their state, which are left out if ``only_trainable``; the ``base``
    has these parameters, if one was named.
    """

    exclude: tuple[str, ...] = ()
    only_trainable: bool = False
    keys: tuple[str, ...] = ()
    base: Base | None = None

    def covers(self, key: str) -> bool:
        """Whether something was left out at ``key``, below it, or with what it is below."""
        name = without_rank(key)
        return any(is_below(name, text) or is_below(text, name) for text in self.exclude) or any(
            is_below(key, text) or is_below(text, key) for text in self.keys
        )

    def among(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Those of ``keys`` that were left out themselves, or with what they are below."""
        exclude, frozen = frozenset(self.exclude), frozenset(self.keys)
        return tuple(key for key in keys if is_among(without_rank(key), exclude) or is_among(key, frozen))

    def problems(self) -> Iterator[str]:
        """Why no writer could have written this; nothing if it is right."""
        for text in (*self.exclude, *self.keys):
            if not text:
                yield f"{shown(text)} is no key that could have been left out"
        if self.keys and not self.only_trainable:
            yield "it leaves out what is not trained, and does not say so"
        if self.base is not None and not (
            self.only_trainable and self.base.path and _DIGEST.fullmatch(self.base.digest)
        ):
            yield f"{shown(self.base.path)} is no base of what is not trained"

    def __str__(self) -> str:
        parts = [f"exclude={list(self.exclude)}"] if self.exclude else []
        parts += ["only_trainable"] if self.only_trainable else []
        return " and ".join(parts)


def note_on(missing: Sequence[str], left_out: LeftOut | None) -> str:
    """Why some of the ``missing`` keys are not in the checkpoint, and what to do; empty if none was left out."""
    found = left_out.among(missing) if left_out is not None else ()
    if not found:
        return ""
    return (
        f"{some(found, most=3)} {'was' if len(found) == 1 else 'were'} left out when it was saved, with {left_out}: get that "
        "from where it came from, and make this Checkpoint with the same, or restore with partial=True"
    )
