"""``distckpt show``: what is in one checkpoint. Reads its manifest and index, and no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import msgspec

from distckpt.cli import options, text
from distckpt.cli.grouping import in_words
from distckpt.cli.tables import Table, Twig
from distckpt.directory.exports import read_export
from distckpt.directory.locate import Located, locate, read_index
from distckpt.directory.pins import pin_of
from distckpt.directory.reports import reported_metrics
from distckpt.directory.tags import tags_by_attempt
from distckpt.format import names
from distckpt.format.arrow.dtypes import VALUE
from distckpt.format.tree.tree import RankStep, Step, decode_path
from distckpt.terminal.sizes import counted, human_bytes

if TYPE_CHECKING:
    from distckpt.format.arrow.index import Index, KeyInfo
    from distckpt.format.json.export import ExportManifest
    from distckpt.format.json.lease import Lease
    from distckpt.format.json.left_out import LeftOut

MOST_RANKS = 16
MOST_LEFT_OUT = 4


@click.command("show")
@click.argument("path")
@options.as_json
@options.storage_options
def show_checkpoint(path: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Show what a checkpoint holds: its keys with shape, type and size, which rank wrote what, and its export."""
    where = locate(path, storage_options)
    index = read_index(where)
    export = read_export(where.store, where.folder)
    pin = pin_of(where.store, where.manifest.attempt)
    metrics = reported_metrics(where.store, where.manifest.attempt)
    groups = in_words(where.store).get(where.manifest.attempt, [])
    tags = tags_by_attempt(where.store).get(where.manifest.attempt, ())
    if as_json:
        text.print_json({**_as_json(where, index, export, pin, metrics), "groups": groups, "tags": tags})
    else:
        _print(where, index, export, pin, metrics, groups, tags)


# ---- for people ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Branch:
    """A place in the tree, with what is below it added up."""

    label: str
    info: KeyInfo | None = None
    nbytes: int = 0
    ranks: set[int] = field(default_factory=set)
    children: dict[Step, _Branch] = field(default_factory=dict)


def _print(
    where: Located,
    index: Index,
    export: ExportManifest | None,
    pin: Lease | None,
    metrics: Mapping[str, float],
    groups: list[str],
    tags: tuple[str, ...],
) -> None:
    console = text.console()
    manifest = where.manifest
    tensors = sum(dtype != VALUE for dtype in index.dtypes)
    stored = sum(shard.size for shard in manifest.shards)
    console.print(where.path, style="bold", soft_wrap=True)
    console.print(
        f"saved {text.local_time(manifest.time)} by {counted(manifest.world_size, 'rank')}, attempt {manifest.attempt}"
    )
    console.print(
        f"{counted(tensors, 'tensor')} and {counted(len(index.names) - tensors, 'value')} "
        f"in {counted(len(index), 'chunk')}, {counted(len(manifest.shards), 'shard')}, "
        f"{human_bytes(stored)}"
    )
    if manifest.left_out is not None:
        console.print(_left_out(manifest.left_out), soft_wrap=True, markup=False)
    if export is not None:
        exported = ", ".join(module.name for module in export.modules)
        nbytes = sum(file.size for _, file in export.files())
        console.print(f"exported {text.local_time(export.time)}: {exported}, {human_bytes(nbytes)}")
    if tags:
        console.print(f"tagged {', '.join(tags)}", soft_wrap=True)
    if pin is not None:
        console.print(text.pin_in_words(pin))
    if groups:
        console.print(f"groups that follow: {', '.join(groups)}", soft_wrap=True)
    if metrics:
        console.print(", ".join(f"{name}={value:.5g}" for name, value in metrics.items()))
    console.print()
    table = Table(["key", "shape", "type", "size", "written by"], right=["size"], least=["written by", "type", "shape"])
    for twig, branch in _lines(_tree(where, index)):
        info = branch.info
        shape = _shape(info.shape) if info is not None and info.dtype != VALUE else ""
        dtype = ("value" if info.dtype == VALUE else info.dtype) if info is not None else ""
        ranks = _written_by(branch, manifest.world_size)
        table.add_row(
            twig,
            shape,
            dtype,
            human_bytes(branch.nbytes),
            ranks,
            style="" if info is not None else "bold",
        )
    console.print(table)
    console.print()
    _print_ranks(where, index)


def _left_out(left_out: LeftOut) -> str:
    said = [f"{', '.join(left_out.exclude)} by exclude"] if left_out.exclude else []
    if left_out.only_trainable:
        keys = left_out.keys
        more = f" and {counted(len(keys) - MOST_LEFT_OUT, 'more key')}" if len(keys) > MOST_LEFT_OUT else ""
        base = f", which {left_out.base.path} has ({left_out.base.digest[:16]})" if left_out.base is not None else ""
        said.append(f"{', '.join(keys[:MOST_LEFT_OUT]) or 'nothing'}{more} by only_trainable{base}")
    return f"left out: {'; '.join(said)}"


def _tree(where: Located, index: Index) -> _Branch:
    root = _Branch("")
    for key in index.names:
        info = index.info(key)
        branch = root
        for step in decode_path(info.path, where.path):
            branch = branch.children.setdefault(step, _Branch(_label(step)))
            branch.nbytes += info.nbytes
            branch.ranks.update(info.ranks)
        branch.info = info
    return root


def _lines(root: _Branch) -> Iterator[tuple[Twig, _Branch]]:
    """Every place below the root with the lines that lead to it, drawn from top to bottom."""
    waiting = [("", "", branch) for branch in reversed(root.children.values())]
    while waiting:
        here, below, branch = waiting.pop()
        yield Twig(here, below + ("│ " if branch.children else "  "), branch.label), branch
        children = list(branch.children.values())
        lines = [(f"{below}├─ ", f"{below}│  ", child) for child in children[:-1]]
        lines += [(f"{below}└─ ", f"{below}   ", child) for child in children[-1:]]
        waiting.extend(reversed(lines))


def _label(step: Step) -> str:
    shown = f"@{step.rank}" if isinstance(step, RankStep) else str(step)
    return "".join(character if character.isprintable() else "?" for character in shown)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape else "scalar"  # noqa: RUF001  the sign is meant


def _written_by(branch: _Branch, world_size: int) -> str:
    if len(branch.ranks) == world_size > 1:
        return "all"
    ranks = sorted(branch.ranks)
    shown = text.number_ranges(ranks)
    return shown if len(shown) <= 20 else f"{len(ranks)} ranks"


def _print_ranks(where: Located, index: Index) -> None:
    table = Table(["rank", "shards", "chunks", "size"], right=["rank", "shards", "chunks", "size"])
    chunks = _count(index.rank.tolist())
    shards = _count(shard.rank for shard in where.manifest.shards)
    sizes: dict[int, int] = {}
    for shard in where.manifest.shards:
        sizes[shard.rank] = sizes.get(shard.rank, 0) + shard.size
    for rank in list(shards)[:MOST_RANKS]:
        table.add_row(f"{rank}", f"{shards[rank]}", f"{chunks.get(rank, 0):,}", human_bytes(sizes[rank]))
    text.console().print(table)
    if len(shards) > MOST_RANKS:
        text.console().print(f"and {counted(len(shards) - MOST_RANKS, 'more rank')}; --json shows them all")


def _count(ranks: Any) -> dict[int, int]:
    counts: dict[int, int] = {}
    for rank in ranks:
        counts[rank] = counts.get(rank, 0) + 1
    return counts


# ---- for programs -------------------------------------------------------------------------------------------------


def _as_json(
    where: Located, index: Index, export: ExportManifest | None, pin: Lease | None, metrics: Mapping[str, float]
) -> dict[str, Any]:
    manifest = msgspec.to_builtins(where.manifest)
    for shard in manifest["shards"]:
        shard["file"] = names.shard_name(shard["rank"], shard["shard"])
    return {
        "path": where.path,
        "nbytes": sum(shard.size for shard in where.manifest.shards),
        **manifest,
        "export": msgspec.to_builtins(export),
        "pin": text.pin_as_json(pin),
        "metrics": metrics,
        "keys": [{**_key_as_json(index.info(key)), "chunks": _chunks_as_json(index, key)} for key in index.names],
    }


def _key_as_json(info: KeyInfo) -> dict[str, Any]:
    return {
        "key": info.key,
        "path": msgspec.json.decode(info.path),
        "dtype": info.dtype,
        "shape": info.shape,
        "nbytes": info.nbytes,
        "ranks": info.ranks,
    }


def _chunks_as_json(index: Index, key: str) -> list[dict[str, Any]]:
    ndim = int(index.ndims[index.ids[key]])
    return [
        {
            "rank": int(index.rank[row]),
            "shard": int(index.shard[row]),
            "position": int(index.position[row]),
            "size": int(index.size[row]),
            "crc32c": int(index.blocks[index.starts[row + 1] - 1]),
            "offset": index.offset[row, :ndim].tolist(),
            "length": index.length[row, :ndim].tolist(),
        }
        for row in index.rows(key).tolist()
    ]
