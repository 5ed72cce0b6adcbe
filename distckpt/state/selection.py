"""Restoring something else than what was saved: which keys of a checkpoint are wanted, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.format.json.left_out import LeftOut
from distckpt.format.tree.keys import beginnings, is_among, is_below
from distckpt.format.tree.select import select_paths
from distckpt.format.tree.tree import ArrayStep, DictStep, KeyStep, Path, Step, TypedStep, key_of
from distckpt.state.leaving import Leaving

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""From what keys begin with (up to a ``.`` or ``@``) to what they begin with here, or from a key to the key here; None
leaves it out."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted of a checkpoint. Everything, under the names that it was saved by, if nothing is said."""

    select: tuple[str, ...] = ()
    rename: Rename | None = None

    @staticmethod
    def of(select: str | Sequence[str] | None, rename: Rename | None) -> Selection:
        """As ``restore`` takes them."""
        chosen = (select,) if isinstance(select, str) else tuple(select or ())
        return Selection(chosen, rename)

    def apply(
        self,
        paths: Mapping[str, Path],
        texts: Mapping[str, str],
        where: str,
        leaving: Leaving,
        left_out: LeftOut | None = None,
    ) -> tuple[dict[str, Path], dict[str, str]]:
        """Paths by the keys here, and of each its key in the checkpoint. What is excluded here is not wanted.

        KeyError, naming similar keys or saying that it was ``left_out``, for a selector that nothing begins with;
        ValueError for two keys renamed to one, and if all that is selected is excluded.
        """
        wanted = list(paths)
        if self.select:
            parts = _parts(texts, self.select)
            found = {
                key
                for selector in self.select
                for key in select_paths(parts[selector] or texts, selector, where, left_out)
            }
            wanted = [key for key in paths if key in found]
        excluded = None
        moved: dict[str, Path] = {}
        origins: dict[str, str] = {}
        for key in wanted:
            new = self.name_here(key)
            if new is not None and leaving.excludes(new):
                excluded = new
            if new is None or new == excluded:
                continue
            if new in moved:
                raise ValueError(f"rename makes {new!r} of both {origins[new]!r} and {key!r}")
            moved[new] = paths[key] if new == key else self._path_here(paths[key], key, new)
            origins[new] = key
        if self.select and excluded is not None and not moved:
            raise ValueError(
                f"{excluded!r}, and all else that is selected, is excluded from this Checkpoint, and stays as it is. "
                "Restore it by a Checkpoint that does not exclude it"
            )
        return moved, origins

    def name_here(self, key: str) -> str | None:
        """What a key of the checkpoint is called here; None if it is left out."""
        if self.rename is None:
            return key
        if not isinstance(self.rename, Mapping):
            return self.rename(key)
        begins = self._begins(key)
        if begins is None:
            return key
        here = self.rename[begins]
        return None if here is None else f"{here}{key[len(begins) :]}"

    def _begins(self, key: str) -> str | None:
        """What the key begins with of all that is renamed by its beginning; the longest."""
        renamed = self.rename if isinstance(self.rename, Mapping) else {}
        return next((text for text in beginnings(key) if text in renamed), None)

    def _path_here(self, path: Path, key: str, new: str) -> Path:
        """The path of a key that is called ``new`` here. What follows a renamed beginning stays, if it is steps of its own."""
        begins = self._begins(key)
        if begins is not None:
            for at in _counts(path, lambda part: part == begins):
                return (*_moved(path[:at], new.removesuffix(key[len(begins) :])), *path[at:])
        return _moved(path, new)

    def askers(self, leaving: Leaving) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
        """Tells of an object's key whether it is to be restored at all; and whether all that is at and below it is."""
        here = {name for selector in self.select if (name := self.name_here(selector)) is not None}

        def is_selected(key: str) -> bool:
            return not self.select or is_among(key, here)

        def asks(key: str) -> bool:
            return is_selected(key) and not leaving.leaves_out(key)

        def asks_all(key: str) -> bool:
            return is_selected(key) and not leaving.touches(key)

        return asks, asks_all


EVERYTHING = Selection()


def _parts(texts: Mapping[str, str], selectors: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each selector those keys that it can mean, every key looked at once."""
    parts: dict[str, dict[str, str]] = {selector: {} for selector in selectors}
    for key, text in texts.items():
        for beginning in beginnings(key):
            if beginning in parts:
                parts[beginning][key] = text
    return parts


def joined(path: Path, at: int, before: Path) -> Path:
    """A renamed path whose step ``at`` is the name of a parameter: one step, however many dots it has now."""
    end = at + 1 + len(path) - len(before)
    inner = path[at:end]
    return (*path[:at], DictStep(key_of(inner)), *path[end:]) if end > at + 1 else path


def as_there(path: Path, there: Path) -> Path:
    """A renamed path; or, if the leaf of that key that is ``there`` goes by other steps, those.

    A key does not tell a level from a dot, nor a place in a list or a number from a text. What kind of container or of
    array it was stays as it was saved.
    """
    if _bare(path) == _bare(there):
        return path
    of_array = tuple(step for step in path if isinstance(step, ArrayStep))
    return (*(step for step in there if not isinstance(step, ArrayStep)), *of_array)


def _bare(path: Path) -> Path:
    steps = (step.step if isinstance(step, TypedStep) else step for step in path)
    return tuple(step for step in steps if not isinstance(step, ArrayStep))


def _moved(path: Path, key: str) -> Path:
    """A path for the new key: the steps that it still begins and ends with, and one step for what is between.

    What it begins with is the name of an object, a step of its own, whatever was a step before. What is renamed within a
    container stays in one of its kind.
    """
    head = max(_counts(path, lambda part: is_below(key, part)), default=0)
    rest = key[len(key_of(path[:head])) :].lstrip(".")
    tails = {at: key_of(path[at:]) for at in range(max(head, 1), len(path) + 1)}
    ends = [at for at, tail in tails.items() if _ends_with(rest, tail) and (head or tail != rest)]
    tail = path[min(ends) :] if ends else ()
    middle = rest[: len(rest) - len(key_of(tail))].rstrip(".")
    between: list[Step] = []
    if middle and head == 0:
        name, _, middle = middle.partition(".")
        between.append(DictStep(name))
    if middle:
        match path[head:]:
            case (TypedStep(kind, DictStep() | KeyStep()), *_) if head:
                between.append(TypedStep(kind, DictStep(middle)))
            case _:
                between.append(DictStep(middle))
    return (*path[:head], *between, *tail)


def _counts(path: Path, fits: Callable[[str], bool]) -> Iterable[int]:
    return (count for count in range(1, len(path) + 1) if fits(key_of(path[:count])))


def _ends_with(text: str, end: str) -> bool:
    return not end or text == end or text.endswith((f".{end}", end if end.startswith("@") else f".{end}"))
