"""Going without what could not be read, only where somebody has said so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distckpt.errors import ForeignError
from distckpt.foreign.contents import Contents
from distckpt.format.tree.keys import beginnings, hint, is_among


def without(contents: Contents, leave_out: Sequence[str]) -> Contents:
    """What is left of it without all that is below these texts. What could not be read must be among that.

    ForeignError, naming keys and reasons, for what could not be read and is not; KeyError for a text that nothing is below.
    """
    every = (*contents.paths, *contents.refused)
    there = {text for key in every for text in beginnings(key)}
    for text in leave_out:
        if text not in there:
            raise KeyError(f"{contents.path} has no key {text!r} to leave out{hint(text, every)}")
    missed = {key: why for key, why in contents.refused.items() if not is_among(key, leave_out)}
    if missed:
        raise ForeignError(contents.path, missed)
    kept = {key: path for key, path in contents.paths.items() if not is_among(key, leave_out)}
    gone = {key: "left out, as was asked for" for key in contents.paths if key not in kept}
    return replace(
        contents,
        paths=kept,
        tensors={key: held for key, held in contents.tensors.items() if key in kept},
        values={key: value for key, value in contents.values.items() if key in kept},
        refused={**contents.refused, **gone},
    )
