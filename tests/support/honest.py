"""A file system of fsspec's that keeps its word."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem


class Honest(AbstractFileSystem):  # type: ignore[misc]
    """Files below ``base``, created by a link as LocalStore does it, so that exactly one writer can."""

    protocol = "honest"

    def __init__(self, base: str, **options: Any) -> None:
        super().__init__(**options)
        self.base = Path(base)

    def place(self, path: str) -> Path:
        return self.base / str(self._strip_protocol(path))

    def described(self, place: Path) -> dict[str, Any]:
        status = place.stat()
        kind = "directory" if place.is_dir() else "file"
        name = place.relative_to(self.base).as_posix()
        return {"name": name, "type": kind, "size": status.st_size, "mtime": status.st_mtime}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self.described(self.place(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        place = self.place(path)
        found = []
        for each in sorted(place.iterdir()) if place.is_dir() else [place]:
            with contextlib.suppress(*([FileNotFoundError] if place.is_dir() else [])):
                found.append(self.described(each))
        return found if detail else [each["name"] for each in found]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.place(path).mkdir(parents=True, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        self.place(path).unlink()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self.place(path).open(mode)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.publish(path, value, mode == "create")

    def publish(self, path: str, value: bytes, once: bool) -> None:
        place = self.place(path)
        new = self.base / f"new-{uuid.uuid4().hex}"
        new.write_bytes(value)
        if not place.parent.is_dir():
            new.unlink()
            raise FileNotFoundError(path)
        if once:
            try:
                os.link(new, place)
            finally:
                new.unlink()
        else:
            new.replace(place)
