"""Choosing part of a saved tree by the text that people write: ``model``, ``optimizer.state``, ``loader@3``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.keys import hint
from distckpt.format.tree.path import ArrayStep, DictStep, Path, RankStep, Step, TypedStep, decode_path


def select_paths(
    paths: Mapping[str, str], selector: str, where: str, left_out: LeftOut | None = None
) -> dict[str, Path]:
    """The keys that ``selector`` means, each with its path below the selected place.

    ``paths`` maps every key to its path as JSON text. The selector is a key, or what a key begins with up to a ``.``
    or ``@``; a key of exactly that name is meant alone, and has an empty path. KeyError, naming keys that look like
    it or saying that it was ``left_out``, if there is none. DamagedError, naming ``where``, for a text that is no path.
    """
    if selector in paths:
        path = decode_path(paths[selector], where)
        return {selector: tuple(step for step in path if isinstance(step, ArrayStep))}
    begins = (f"{selector}.", f"{selector}@")
    found = {key: path_below(decode_path(paths[key], where), selector) for key in paths if key.startswith(begins)}
    chosen = {key: path for key, path in found.items() if path is not None}
    if not chosen:
        raise unknown_key(selector, paths, where, left_out)
    return chosen


def path_below(path: Path, selector: str) -> Path | None:
    """What is left of ``path`` below the place that ``selector`` means; None if it is elsewhere.

    A selector may end at a dot inside a step, since the names of parameters have dots: then the rest of that step
    becomes the first one.
    """
    rest = selector
    for at, step in enumerate(path):
        text = _text(step, first=at == 0)
        if not rest:
            return path[at:]
        if text.startswith(f"{rest}.") and (shorter := _shortened(step, text[len(rest) + 1 :])) is not None:
            return (shorter, *path[at + 1 :])
        if not rest.startswith(text):
            return None
        rest = rest[len(text) :]
    return None if rest else ()


def _shortened(step: Step, name: str) -> Step | None:
    if isinstance(step, DictStep):
        return DictStep(name)
    if isinstance(step, TypedStep) and isinstance(step.step, DictStep):
        return TypedStep(step.kind, DictStep(name))
    return None


def unknown_key(key: str, known: Collection[str], where: str, left_out: LeftOut | None = None) -> KeyError:
    """The error for a key that is not there; it says that it was left out, or names up to three that look like it."""
    if left_out is not None and left_out.covers(key):
        return KeyError(f"{where} does not have {key!r}, which was left out when it was saved, with {left_out}")
    return KeyError(f"{where} has no key {key!r}{hint(key, known)}")


def _text(step: Step, *, first: bool) -> str:
    if isinstance(step, RankStep):
        return f"@{step.rank}"
    return str(step) if first else f".{step}"
