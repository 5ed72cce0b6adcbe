"""Which file system a path lies on, and what that means for those who look at it from elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_TABLE = "/proc/self/mountinfo"
_NFS_SECONDS = 60
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system of that ``kind``, such as ``nfs4``, mounted at ``point`` with these options."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of the option; '' if it has none, None if it is not set."""
        for option in self.options:
            key, _, value = option.partition("=")
            if key == name:
                return value
        return None

    @property
    def seconds_behind(self) -> int:
        """For how long another host may not see what was created or deleted here; 0 if it sees that at once."""
        if not re.fullmatch("nfs4?", self.kind) or self.option("noac") is not None:
            return 0
        given = self.option("acdirmax") or ""
        return int(given) if given.isdigit() else _NFS_SECONDS


def mounts(lines: Iterable[str]) -> Iterator[Mount]:
    """What the lines of a ``mountinfo`` say, in their order; a line that is none is left out."""
    for line in lines:
        fields, _, of_kind = line.rstrip("\n").partition(" - ")
        parts, kinds = fields.split(" "), of_kind.split(" ")
        if len(parts) >= 6 and len(kinds) >= 3:
            options = (*parts[5].split(","), *kinds[2].split(","))
            yield Mount(_plain(parts[4]), kinds[0], _plain(kinds[1]), options)


def mount_of(path: str, lines: Iterable[str] | None = None) -> Mount | None:
    """The mount that an absolute path without links lies on, which need not exist; None where the system does not say."""
    found = None
    for mount in mounts(_lines() if lines is None else lines):
        above = mount.point.rstrip("/") + "/"
        if f"{path}/".startswith(above) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def warn_of_late_views(directory: str, lines: Iterable[str] | None = None) -> None:
    """Say once a process, for each directory, that other hosts may see its checkpoints late, if that is so."""
    mount = mount_of(directory, lines)
    if mount is None or not mount.seconds_behind or directory in _warned:
        return
    _warned.add(directory)
    logger.warning(
        "%s is on NFS (%s), which remembers names: what one host has committed, another may not see for %d s. Nothing is lost "
        "or overwritten by that, as the server decides who creates a name, but a restore or a watcher elsewhere may take the "
        "checkpoint before the newest for the newest. Mounted with actimeo=0 or noac, it is seen at once",
        directory,
        mount.point,
        mount.seconds_behind,
    )


def described(path: str) -> str:
    """``the beegfs file system at /mnt/data``, for a message about ``path``."""
    mount = mount_of(os.path.realpath(path))
    return f"the {mount.kind} file system at {mount.point}" if mount else "its file system"


def _plain(text: str) -> str:
    """The kernel writes blanks and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _lines() -> Iterator[str]:
    with contextlib.suppress(OSError), open(_TABLE, errors="surrogateescape") as file:
        yield from file
