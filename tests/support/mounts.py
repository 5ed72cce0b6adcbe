"""File systems of their own, where mounting is permitted."""

from __future__ import annotations

import shutil
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


MAKERS = {
    "ext4": (64, ["mkfs.ext4", "-q", "-F"]),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"]),
    "btrfs": (128, ["mkfs.btrfs", "-q", "-f", "--mixed"]),
}
"""Of each kind the least size of a disk, in MiB, and what makes a file system there."""


@contextmanager
def disk(folder: Path, kind: str, image: Path) -> Iterator[Path]:
    """An empty file system of that kind at ``folder``, which is created, on a disk that is the file ``image``."""
    size, command = MAKERS[kind]
    if kind not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"this kernel has no driver for {kind}")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    if not Path("/dev/loop-control").exists():
        pytest.skip("this kernel has no loop devices")
    with image.open("wb") as file:
        file.truncate(size << 20)
    subprocess.run([*command, str(image)], check=True, capture_output=True)
    with _mounted(folder, ["-t", kind, "-o", "loop", str(image)]):
        yield folder


@contextmanager
def _mounted(folder: Path, arguments: list[str]) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", *arguments, str(folder)]
    made = subprocess.run(command, capture_output=True, check=False, text=True)
    if made.returncode != 0:
        pytest.skip(f"mounting is not possible here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
