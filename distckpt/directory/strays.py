"""Whole checkpoint folders that no log entry knows: copied here by hand, or left behind when the log was deleted."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from distckpt.directory.contents import attempts, checkpoint_folders, is_there
from distckpt.directory.log import Tail, read_tail
from distckpt.errors import LogMissingError
from distckpt.format import names
from distckpt.storage import Store, parts_of


@dataclass(frozen=True, slots=True)
class Stray:
    """An attempt that has a manifest: the ``folder`` that it is in, which looks like ``ckpt-42``, and its id."""

    folder: str
    attempt: str

    @property
    def path(self) -> str:
        """Where its objects are, relative to the store's root."""
        return f"{self.folder}/{self.attempt}"


def strays(store: Store, known: Container[str]) -> Iterator[Stray]:
    """Every attempt with a manifest that is not among ``known``. What never came to a manifest is none."""
    for folder in sorted(checkpoint_folders(parts_of(store)[0])):
        yield from strays_in(store, folder, known)


def strays_in(store: Store, folder: str, known: Container[str]) -> Iterator[Stray]:
    """Those of one checkpoint folder."""
    for attempt in sorted(attempts(parts_of(store)[0], folder)):
        if attempt not in known:
            stray = Stray(folder, attempt)
            if is_there(store, f"{stray.path}/{names.MANIFEST}"):
                yield stray


def read_run(store: Store) -> Tail:
    """The log's tail. LogMissingError if there is none although there are checkpoints: then nobody knows what counts.

    Raises what ``read_tail`` raises.
    """
    tail = read_tail(store)
    if tail.entry is not None:
        return tail
    folders = dict.fromkeys(stray.folder for stray in strays(store, ()))
    if folders:
        # Whoever saves here has claimed the directory in the log before: that may just have happened.
        tail = read_tail(store)
        if tail.entry is None:
            raise LogMissingError(store.url, sorted(folders, key=_in_order))
    return tail


def _in_order(folder: str) -> tuple[str, int]:
    name, number = names.parse_checkpoint(folder) or (folder, 0)
    return name, number
