"""What an export says of itself: which files it has. It exists from the moment at which this is on storage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import msgspec

from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import MAX_BYTES, MAX_CRC32C, shown
from distckpt.format.names import export_folder, is_attempt, is_export, is_export_file, is_name

FORMAT = 1
MAX_EXPORT_BYTES = 16 << 20


class ExportedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of an exported module; ``size`` in bytes."""

    name: str
    size: int
    crc32c: int


class ExportedModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module's folder and what is in it."""

    name: str
    files: tuple[ExportedFile, ...]


class ExportManifest(Sealed, frozen=True, forbid_unknown_fields=True):
    """The export of ``attempt``, made at ``time`` (epoch seconds). ``id`` names its folder, ``export-<id>``."""

    MAX_BYTES: ClassVar[int] = MAX_EXPORT_BYTES

    format: int
    id: str
    attempt: str
    time: float
    modules: tuple[ExportedModule, ...]

    @property
    def folder(self) -> str:
        """Its folder inside the attempt."""
        return export_folder(self.id)

    def files(self) -> Iterator[tuple[str, ExportedFile]]:
        """Every file with its path inside the attempt."""
        for module in self.modules:
            for file in module.files:
                yield f"{self.folder}/{module.name}/{file.name}", file

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        if not is_export(self.folder):
            yield f"{shown(self.id)} is not an export's id"
        if not is_attempt(self.attempt):
            yield f"{shown(self.attempt)} is not an attempt id"
        if not math.isfinite(self.time):
            yield "its time is not a number"
        if len({module.name for module in self.modules}) < len(self.modules):
            yield "it lists a module twice"
        for module in self.modules:
            yield from _module_problems(module)


def _module_problems(module: ExportedModule) -> Iterator[str]:
    if not is_name(module.name):
        yield f"{shown(module.name)} is not a module's name"
    if len({file.name for file in module.files}) < len(module.files):
        yield f"it lists a file of {shown(module.name)} twice"
    for file in module.files:
        if not is_export_file(file.name):
            yield f"{shown(file.name)} is not a file of an exported module"
        if not (0 <= file.size <= MAX_BYTES and 0 <= file.crc32c <= MAX_CRC32C):
            yield f"size or CRC32C of {shown(file.name)} is out of bounds"
