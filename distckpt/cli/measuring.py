"""``distckpt du``: where the bytes are. Reads manifests and indexes, and no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory.locate import Located, locate, located, read_index
from distckpt.directory.log import read_tail
from distckpt.directory.usage import Usage, summed, usage_of
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.storage import open_store
from distckpt.terminal.sizes import counted, human_bytes

if TYPE_CHECKING:
    from distckpt.format.json.log import CheckpointRecord
    from distckpt.storage import Store

MOST_RANKS = 16
"""Shown to people, the largest; --json shows all."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A checkpoint, ``stored`` bytes of shards on storage, and what is in them; ``error`` says why that is not known."""

    name: str
    stored: int
    usage: Usage
    error: str = ""


@click.command("du")
@click.argument("path")
@options.as_json
@options.storage_options
@click.pass_context
def measure(ctx: click.Context, path: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Show where the bytes are: by what was saved, by rank and by type, of one checkpoint, or of all that a directory has.

    Sizes of tensors and values are without what a shard adds for alignment and its own description; what is stored is
    with it. Exit status 1 if an index cannot be read.
    """
    where, found = _measured(path, storage_options)
    total = summed(one.usage for one in found)
    if as_json:
        shown = [
            {"checkpoint": one.name, "stored": one.stored, "error": one.error, **_as_json(one.usage)} for one in found
        ]
        stored = sum(one.stored for one in found)
        text.print_json({"path": where, "stored": stored, **_as_json(total), "checkpoints": shown})
    else:
        _print(where, found, total)
    if any(one.error for one in found):
        ctx.exit(1)


def _measured(path: str, storage_options: Mapping[str, Any]) -> tuple[str, list[Measured]]:
    store = open_store(path, storage_options)
    tail = read_tail(store)
    if tail.entry is None:
        where = locate(path, storage_options)
        return where.path, [_of(where)]
    state, lost = tail.readable()
    records = list(reversed(state.newest_first()))
    if not records and not lost:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
    unread = [Measured(names.page_path(one.page.id), 0, Usage(), str(one.error)) for one in lost]
    return store.url, [*(_of_record(store, record) for record in records), *unread]


def _of(where: Located) -> Measured:
    name = names.checkpoint_folder(where.manifest.name, where.manifest.number)
    stored = sum(shard.size for shard in where.manifest.shards)
    return Measured(name, stored, usage_of(read_index(where), where.path))


def _of_record(store: Store, record: CheckpointRecord) -> Measured:
    try:
        return _of(located(store, record))
    except (DamagedError, StorageError) as error:
        return Measured(names.checkpoint_folder(record.name, record.number), record.nbytes, Usage(), str(error))


def _as_json(usage: Usage) -> dict[str, Any]:
    return {
        "nbytes": usage.nbytes,
        "keys": dict(usage.keys),
        "ranks": {str(rank): nbytes for rank, nbytes in sorted(usage.ranks.items())},
        "dtypes": dict(usage.dtypes),
    }


def _print(where: str, found: list[Measured], total: Usage) -> None:
    console = text.console()
    stored = sum(one.stored for one in found)
    console.print(where, style="bold", soft_wrap=True)
    console.print(
        f"{counted(len(found), 'checkpoint')}, {human_bytes(stored)} stored, {human_bytes(total.nbytes)} saved"
    )
    if len(found) > 1:
        table = Table(["checkpoint", "stored", "saved"], right=["stored", "saved"])
        for one in found:
            table.add_row(one.name, human_bytes(one.stored), "" if one.error else human_bytes(one.usage.nbytes))
        console.print()
        console.print(table)
    ranks = {f"rank {rank}": nbytes for rank, nbytes in total.ranks.items()}
    for what, parts in (("what", total.keys), ("written by", ranks), ("type", total.dtypes)):
        console.print()
        console.print(_shares(what, parts, total.nbytes))
        if len(parts) > MOST_RANKS:
            console.print(f"and {len(parts) - MOST_RANKS:,} more; --json shows them all")
    for one in found:
        if one.error:
            console.print(Text(f"not measured: {one.error}", style="bold red"), overflow="fold")


def _shares(what: str, parts: Mapping[str, int], whole: int) -> Table:
    table = Table([what, "size", "share"], right=["size", "share"])
    largest = sorted(parts.items(), key=lambda part: -part[1])[:MOST_RANKS]
    for name, nbytes in largest:
        shown = "".join(character if character.isprintable() else "?" for character in name)
        table.add_row(shown, human_bytes(nbytes), f"{100 * nbytes / (whole or 1):.1f} %")
    return table
