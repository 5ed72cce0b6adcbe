"""How long a rank needs to restore state of its own that many other ranks have saved: to match it, and to fill it.

    python benchmarks/resizing.py [--ranks 256 1024 4096]

All ranks' state lies in one shard here: what is measured is how it is found and put together, not how it is read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import torch

import distckpt
from distckpt.coordinator.messages import Receipt
from distckpt.directory.locate import Located, read_index
from distckpt.format import names
from distckpt.format.arrow.index import encode_index
from distckpt.format.arrow.shard import Chunk
from distckpt.format.json.manifest import FORMAT, Manifest, ShardRecord
from distckpt.sharding.description import build_description
from distckpt.sharding.plan import make_plan
from distckpt.state.collector import Collector
from distckpt.state.filler import Filler
from distckpt.state.stored import Committed
from distckpt.storage import LocalStore
from distckpt.transfer.staging import Staging
from distckpt.transfer.writer import write_shard

RANKS = (256, 1024, 4096)
ATTEMPT = f"e1-{0:032x}"


@dataclass(frozen=True, slots=True)
class Figure:
    """Seconds of one rank: to find out how its state matches what ``ranks`` ranks have saved, and to take it."""

    ranks: int
    match: float
    fill: float


def state(rank: int) -> dict[str, Any]:
    """What each rank has: a data cursor and random numbers, say."""
    return {"epoch": 3, "position": rank, "shuffled": list(range(16)), "generator": torch.arange(64) + rank}


def measure(ranks: int, folder: Path, repetitions: int) -> list[Figure]:
    """Restore it on one rank less, several times."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        where = write(Path(inside), ranks)
        return [_once(where, ranks) for _ in range(repetitions)]


def _once(where: Located, ranks: int) -> Figure:
    own = distckpt.PerRank(state(0), on_resize=lambda values, rank, world: values[rank])
    index = read_index(where)
    begin = time.perf_counter()
    filler = Filler(distckpt.Checkpoint(loader=own), Committed(where, index), 5, ranks - 1)
    matched = time.perf_counter()
    filler.read()
    filler.finish()
    end = time.perf_counter()
    if own.obj["position"] != 5:
        raise AssertionError("what was restored is not what was saved")
    return Figure(ranks, matched - begin, end - matched)


def write(folder: Path, ranks: int) -> Located:
    """A checkpoint of so many ranks with state of their own, all of it written by the first."""
    store, path = LocalStore(folder), names.attempt_folder("ckpt", 1, ATTEMPT)
    held = [
        Collector(distckpt.Checkpoint(loader=distckpt.PerRank(state(rank))), rank, ranks).collect()
        for rank in range(ranks)
    ]
    found = [
        entry
        for one in held
        for entry in zip(one.rows, one.sources, one.values, strict=True)
        if entry[0].key.startswith("loader")
    ]
    plan = make_plan(1, {0: build_description([row for row, _, _ in found]).encode()}, {})
    written = [found[at] for at in np.frombuffer(plan.rows(0), "<i4").tolist()]
    chunks = [Chunk(row.key, row.dtype, row.shape, row.offset, row.length, row.nbytes) for row, _, _ in written]
    sources = [source for _, source, _ in written if source is not None]
    values = [value for _, _, value in written if value is not None]
    staging = Staging(chunks, values)
    staging.stage(sources, values)
    shards = tuple(write_shard(store, f"{path}/{names.shard_name(0, at.number)}", at) for at in staging.shards)
    staging.close()
    index = encode_index(plan.table, {0: Receipt(ATTEMPT, shards)})
    store.put_if_absent(f"{path}/{names.INDEX}", index)
    records = tuple(ShardRecord(rank=0, shard=one.shard, size=one.size, crc32c=one.crc32c) for one in shards)
    size, crc = len(index), crc32c.crc32c(index)
    manifest = Manifest(FORMAT, "ckpt", 1, ATTEMPT, 1, time.time(), ranks, size, crc, records)
    return Located(store, path, f"{store.url}/ckpt-1", manifest)


def main() -> None:
    """Print the figures for growing numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    args = parser.parse_args()
    print("ranks  match s   fill s")
    for ranks in args.ranks:
        (figure,) = measure(ranks, Path("bench-output"), 1)
        print(f"{ranks:5}{figure.match:9.3f}{figure.fill:9.3f}")


if __name__ == "__main__":
    main()
