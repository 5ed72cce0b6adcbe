"""File systems of their own, where mounting is permitted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """An empty file system of that size at ``folder``, which is created."""
    with _mounted(folder, ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]):
        yield folder


@contextmanager
def read_only(folder: Path, shown: Path) -> Iterator[Path]:
    """``shown``, which may only be read, at ``folder``, which is created."""
    with _mounted(folder, ["--bind", "-o", "ro", str(shown)]):
        yield folder


@contextmanager
def overlay(folder: Path, work: Path) -> Iterator[Path]:
    """An empty overlay, as containers have, at ``folder``, which is created like ``work``; its layers are there, on a tmpfs."""
    with small_disk(work, "256m"):
        for layer in ("lower", "upper", "work"):
            (work / layer).mkdir()
        layers = f"lowerdir={work}/lower,upperdir={work}/upper,workdir={work}/work"
        with _mounted(folder, ["-t", "overlay", "-o", layers, "overlay"]):
            yield folder


@contextmanager
def _mounted(folder: Path, arguments: list[str]) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", *arguments, str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
