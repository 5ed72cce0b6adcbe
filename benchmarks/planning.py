"""How long the coordinator needs to plan a save, and how much memory, as ranks grow.

    python benchmarks/planning.py [--ranks 128 512 1024 2048] [--layouts fsdp ddp hsdp fsdp-tp] [--json]

Every figure is that of a cold process: decode all descriptions, check that they tile every tensor, share out the work.
Memory is the growth of the peak resident size over what it was with all descriptions in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distckpt.sharding.description import Row, build_description
from distckpt.sharding.plan import make_plan

RANKS = (128, 512, 1024, 2048)
_TENSORS_PER_LAYER = (
    ("self_attn.q_proj.weight", (4096, 4096), 0),
    ("self_attn.k_proj.weight", (4096, 4096), 0),
    ("self_attn.v_proj.weight", (4096, 4096), 0),
    ("self_attn.o_proj.weight", (4096, 4096), 1),
    ("mlp.gate_proj.weight", (11008, 4096), 0),
    ("mlp.up_proj.weight", (11008, 4096), 0),
    ("mlp.down_proj.weight", (4096, 11008), 1),
    ("input_layernorm.weight", (4096,), None),
    ("post_attention_layernorm.weight", (4096,), None),
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the made-up model. ``split`` is the dimension that tensor parallelism cuts, None if it cuts none."""

    key: str
    shape: tuple[int, ...]
    split: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks as ``replicas`` x ``shards`` x ``tensor_parallel``, the last one counting fastest."""

    replicas: int
    shards: int
    tensor_parallel: int

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.replicas * self.shards * self.tensor_parallel


LAYOUTS = {
    "fsdp": lambda ranks: Layout(1, ranks, 1),
    "ddp": lambda ranks: Layout(ranks, 1, 1),
    "hsdp": lambda ranks: Layout(8, ranks // 8, 1),
    "fsdp-tp": lambda ranks: Layout(1, ranks // 8, 8),
}


def model(count: int = 300) -> list[Tensor]:
    """A transformer of ``count`` tensors."""
    tensors = [Tensor("model.embed_tokens.weight", (32000, 4096), 0), Tensor("model.norm.weight", (4096,), None)]
    for number in range(count - len(tensors)):
        name, shape, split = _TENSORS_PER_LAYER[number % len(_TENSORS_PER_LAYER)]
        tensors.append(Tensor(f"model.layers.{number // len(_TENSORS_PER_LAYER)}.{name}", shape, split))
    return tensors


def describe(layout: Layout, tensors: list[Tensor]) -> list[bytes]:
    """Every rank's description, as it would send it. Replicas share the same bytes object."""
    parts = [
        build_description(_rows(layout, tensors, shard, part)).encode()
        for shard in range(layout.shards)
        for part in range(layout.tensor_parallel)
    ]
    return parts * layout.replicas


def _rows(layout: Layout, tensors: list[Tensor], shard: int, part: int) -> Iterator[Row]:
    """FSDP cuts dimension 0 of what tensor parallelism left, as torch.chunk does."""
    for tensor in tensors:
        offset, length = [0] * len(tensor.shape), list(tensor.shape)
        if tensor.split is not None:
            offset[tensor.split], length[tensor.split] = _chunk(length[tensor.split], layout.tensor_parallel, part)
        begin, length[0] = _chunk(length[0], layout.shards, shard)
        offset[0] += begin
        if math.prod(length):
            nbytes = 2 * math.prod(length)
            path = json.dumps(["model", tensor.key])
            yield Row(tensor.key, path, "bfloat16", tensor.shape, tuple(offset), tuple(length), nbytes)


def _chunk(size: int, count: int, index: int) -> tuple[int, int]:
    step = -(-size // count)
    start = min(index * step, size)
    return start, min(step, size - start)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement. ``imbalance`` is the fullest rank's bytes over the mean; ``largest`` the largest chunk's."""

    layout: str
    ranks: int
    rows: int
    chunks: int
    seconds: float
    peak_mib: float
    imbalance: float
    largest: float


def measure(name: str, ranks: int) -> Figure:
    """Plan in a fresh process, and report what it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "descriptions"
        with file.open("wb") as out:
            sizes = [out.write(data) for data in describe(LAYOUTS[name](ranks), model())]
        file.with_suffix(".json").write_text(json.dumps(sizes))
        command = [sys.executable, __file__, "--child", name, str(ranks), str(file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Figure(**json.loads(done.stdout))


def plan_once(name: str, ranks: int, file: Path) -> Figure:
    """Plan from the descriptions in ``file``, in this process."""
    sizes = json.loads(file.with_suffix(".json").read_text())
    with file.open("rb") as source:
        descriptions = {rank: source.read(size) for rank, size in enumerate(sizes)}
    before = _peak_mib()
    start = time.perf_counter()
    plan = make_plan(1, descriptions, {})
    seconds = time.perf_counter() - start
    growth = _peak_mib() - before
    nbytes = np.asarray(plan.table["nbytes"])
    load = np.bincount(np.asarray(plan.table["rank"]), weights=nbytes, minlength=ranks)
    rows = len(model()) * ranks
    imbalance, largest = load.max() / load.mean(), nbytes.max() / load.mean()
    return Figure(name, ranks, rows, len(nbytes), seconds, growth, float(imbalance), float(largest))


def _peak_mib() -> float:
    # ru_maxrss starts at what the parent had when it forked; Linux keeps a figure of this process alone.
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _as_dict(figure: Figure) -> dict[str, object]:
    return {name: getattr(figure, name) for name in Figure.__slots__}


def main() -> None:
    """Measure every layout at every size, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_as_dict(plan_once(args.child[0], int(args.child[1]), Path(args.child[2])))))
        return
    figures = [measure(name, ranks) for name in args.layouts for ranks in args.ranks]
    if args.json:
        print(json.dumps([_as_dict(figure) for figure in figures], indent=2))
        return
    print("layout      ranks     rows   chunks  seconds    MiB  fullest/mean  largest/mean")
    for item in figures:
        print(
            f"{item.layout:10}{item.ranks:7}{item.rows:9}{item.chunks:9}{item.seconds:9.3f}{item.peak_mib:7.0f}"
            f"{item.imbalance:14.3f}{item.largest:14.3f}"
        )


if __name__ == "__main__":
    main()
