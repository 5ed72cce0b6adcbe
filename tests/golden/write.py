"""Writes the golden checkpoints of a format version, once: ``python -m tests.golden.write``.

What is in the folder of a version is never written again. It was written by the release that introduced the version,
and every later one must read it. A new format version gets a folder of its own beside it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.format import names
from tests.golden import known
from tests.support.gang import Gang

VERSION = 1
GOLDEN = Path(__file__).parent / f"v{VERSION}"
ONE_RANK, THREE_RANKS, EXPORTED, MUTILATED = "one-rank", "three-ranks", "exported", "mutilated"


def write(root: Path) -> None:
    """All of it, below a folder that is not there yet."""
    root.mkdir()
    write_one_rank(root / ONE_RANK)
    with (
        tempfile.TemporaryDirectory(prefix="golden-") as ray,  # with a folder of its own it finds no other cluster
        Gang(3, {"RAY_TMPDIR": ray, "RAY_USAGE_STATS_ENABLED": "0"}) as gang,
    ):
        gang.run("golden.write:write_three_ranks", directory=str(root / THREE_RANKS))
    write_exported(root / EXPORTED)
    for name, mutilate in MUTILATIONS.items():
        write_mutilated(root / MUTILATED / name, mutilate)
    for folder in (root, *root.rglob("*")):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # git keeps no empty folders


def write_one_rank(directory: Path) -> None:
    """A run of one process that saves 1 and 2 and keeps one of them, and of its restart, which saves 3."""
    for numbers in ((1, 2), (3,)):
        checkpoint = distckpt.Checkpoint(**known.alone(0))
        with distckpt.CheckpointManager(checkpoint, directory, max_to_keep=1) as manager:
            manager.restore_or_initialize()
            for number in numbers:
                known.fill(checkpoint.model, checkpoint.optimizer, number)
                checkpoint.progress["step"] = number
                checkpoint.loader.obj.update(known.cursor(number, 0))
                manager.save(number).result(60)


def write_three_ranks(directory: str) -> None:
    """What each of three ranks does: a model that FSDP2 shards, and state of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = known.Model()
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    optimizer = known.make_optimizer(model)
    known.fill(model, optimizer, 7)
    loader = distckpt.PerRank(known.cursor(7, dist.get_rank()))
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, progress={"step": 7}, loader=loader)
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        manager.save(7).result(60)


def write_exported(directory: Path) -> None:
    """A checkpoint with an export of its model: weights and configuration. A program's own format is torch's affair."""
    model = known.Model()
    optimizer = known.make_optimizer(model)
    known.fill(model, optimizer, 1)
    served = {"served": distckpt.Export(key="model", config={"width": known.WIDTH})}
    checkpoint = distckpt.Checkpoint(model=model)
    with distckpt.ExportCheckpointManager(checkpoint, directory, modules_to_export=served) as manager:
        manager.save(1).result(60)


def write_mutilated(directory: Path, mutilate: Callable[[Path], object]) -> None:
    """A run that saves 1 and 2, and the folder of the attempt at 2 changed by ``mutilate``; it alone is left."""
    checkpoint = distckpt.Checkpoint(**known.small(0))
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        for number in (1, 2):
            checkpoint.state.update(known.small(number)["state"])
            manager.save(number).result(60)
    [attempt] = (directory / "ckpt-2").iterdir()
    mutilate(attempt)
    shutil.rmtree(directory / "ckpt-1")


# ---- mutilations ----------------------------------------------------------------------------------------------------


def _changed(name: str, old: bytes, new: bytes) -> Callable[[Path], object]:
    """The first such place of a file has other bytes, as many as before."""
    assert len(old) == len(new)

    def mutilate(attempt: Path) -> None:
        content = (attempt / name).read_bytes()
        assert old in content, (name, old)
        (attempt / name).write_bytes(content.replace(old, new, 1))

    return mutilate


def _cut(name: str, at: float) -> Callable[[Path], object]:
    """Only that share of a file is left."""

    def mutilate(attempt: Path) -> None:
        os.truncate(attempt / name, int(at * (attempt / name).stat().st_size))

    return mutilate


def _of_another(name: str) -> Callable[[Path], object]:
    """A file is that of checkpoint 1."""

    def mutilate(attempt: Path) -> None:
        [other] = (attempt.parents[1] / "ckpt-1").iterdir()
        shutil.copyfile(other / name, attempt / name)

    return mutilate


def _gone(name: str) -> Callable[[Path], object]:
    return lambda attempt: (attempt / name).unlink()


def _newest_entry(old: bytes, new: bytes) -> Callable[[Path], object]:
    """The newest log entry has other bytes."""

    def mutilate(attempt: Path) -> None:
        newest = max((attempt.parents[1] / names.LOG).iterdir())
        content = newest.read_bytes()
        assert content.count(old) == 1, old
        newest.write_bytes(content.replace(old, new))

    return mutilate


SHARD = names.shard_name(0, 0)
WEIGHT = known.numbered((1,), 5).numpy().tobytes() + known.numbered((1,), 6).numpy().tobytes()

MUTILATIONS: dict[str, Callable[[Path], object]] = {
    "tensor-flipped": _changed(SHARD, WEIGHT, WEIGHT[:-1] + bytes([WEIGHT[-1] ^ 1])),
    "value-changed": _changed(SHARD, b"42      ", b"43      "),
    "schema-changed": _changed(SHARD, b"crc32c", b"crc32d"),
    "shard-cut": _cut(SHARD, 0.5),
    "shard-gone": _gone(SHARD),
    "shard-of-another": _of_another(SHARD),
    "index-changed": _changed(names.INDEX, b'["state","step"]', b'["state","stop"]'),
    "index-cut": _cut(names.INDEX, 0.9),
    "index-gone": _gone(names.INDEX),
    "manifest-changed": _changed(names.MANIFEST, b'"number":2', b'"number":3'),
    "manifest-newer": _changed(names.MANIFEST, b'"format":1', b'"format":2'),
    "manifest-of-another": _of_another(names.MANIFEST),
    "manifest-gone": _gone(names.MANIFEST),
    "entry-changed": _newest_entry(b'"kind":"commit"', b'"kind":"retire"'),
    "entry-newer": _newest_entry(b'"format":1', b'"format":2'),
}


if __name__ == "__main__":
    if GOLDEN.exists():
        sys.exit(f"{GOLDEN} is there: golden checkpoints are written once, by the release that brought the version")
    write(GOLDEN)
