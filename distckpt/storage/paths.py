"""Which paths a store accepts. Every store checks them itself, so that none has to trust its callers."""

from __future__ import annotations

import os
import re

PathLike = str | os.PathLike[str]
"""A local path, or the URL of an object store's folder."""

_PART = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def is_part(name: str) -> bool:
    """Whether ``name`` can be one part of a path. A leading dot is kept for temporary files."""
    return _PART.fullmatch(name) is not None


def object_parts(path: str) -> tuple[str, ...]:
    """The parts of an object's path, at least one.

    ValueError if it is absolute, climbs (``..``), has an empty or hidden part, a backslash or a control character.
    """
    parts = tuple(path.split("/"))
    if not all(map(is_part, parts)):
        raise ValueError(f"not a path inside a store: {path!r}")
    return parts


def folder_parts(folder: str) -> tuple[str, ...]:
    """The parts of a folder's path; none for the root, ``''``. ValueError as for an object."""
    return object_parts(folder) if folder else ()
