"""``distckpt adopt``: take checkpoints into the log that it does not know."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
import msgspec
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.cli.verifying import check
from distckpt.directory.adopt import Found, Survey, adopt, survey
from distckpt.directory.by_hand import check_quiet
from distckpt.directory.log import read_tail
from distckpt.format import names
from distckpt.storage import open_store
from distckpt.terminal.sizes import human_bytes

_STYLES = {"active": "green", "preserved": "cyan", "damaged": "bold red", "passed over": "yellow"}


@click.command("adopt")
@click.argument("directory", metavar="DIR")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@click.option("--force", is_flag=True, help="Also when a job may be running: it is stopped with a FencedError.")
@options.as_json
@options.storage_options
@click.pass_context
def adopt_checkpoints(
    ctx: click.Context, directory: str, dry_run: bool, force: bool, as_json: bool, storage_options: Mapping[str, Any]
) -> None:
    """Write a log for the checkpoints of a directory that has none, or add to its log what was copied there.

    Every byte of what the log does not know is read and checked first. Whole checkpoints are adopted; damaged ones are
    listed and left alone. No checkpoint is overwritten, moved or deleted.

    Without a log the checkpoints become what they were: active ones, which retention counts, and preserved ones as far
    as the file `checkpoint` shows which they were; pins and metrics are lost. Next to checkpoints that are in a log,
    adopted ones are preserved, and the newest stays the newest.

    Exit status 0 if all is well, 1 if something is damaged, 2 if nothing could be done.
    """
    store = open_store(directory, storage_options)
    if not (force or dry_run):
        check_quiet(store, read_tail(store), time.time(), "adopting")
    what = survey(store, check)
    entry = None
    if what.adopts and not dry_run:
        if not force:
            check_quiet(store, what.tail, time.time(), "adopting")
        entry = names.entry_path(adopt(store, what, time.time()).seq)
    if as_json:
        text.print_json({"directory": store.url, "entry": entry, "checkpoints": [_as_json(one) for one in what.found]})
    else:
        _print(what, entry, dry_run)
    if any(one.fate == "damaged" for one in what.found):
        ctx.exit(1)


def _as_json(one: Found) -> dict[str, Any]:
    record = {} if one.record is None else msgspec.to_builtins(one.record)
    return {
        "checkpoint": one.stray.folder,
        "attempt": one.stray.attempt,
        "fate": one.fate,
        "reason": one.reason,
        "damages": [asdict(damage) for damage in one.damages],
        "record": record or None,
    }


def _print(what: Survey, entry: str | None, dry_run: bool) -> None:
    console = text.console()
    if not what.found:
        console.print("nothing to adopt: the log knows every checkpoint here")
        return
    table = Table(
        ["checkpoint", "becomes", "saved", "size", "ranks", "attempt"],
        right=["size", "ranks"],
        least=["attempt", "ranks", "saved", "size"],
    )
    for one in what.found:
        record = one.record
        known = ("", "", "") if record is None else _known(record.time, record.nbytes, record.world_size)
        attempt = one.stray.attempt[: one.stray.attempt.index("-") + 9]
        table.add_row(one.stray.folder, Text(one.fate, style=_STYLES[one.fate]), *known, attempt)
    console.print(table)
    for one in what.found:
        if one.reason:
            console.print(Text(f"{one.stray.path}: {one.fate}: {one.reason}"), overflow="fold")
    newest = next(iter(what.state.active[-1:]), None) or what.state.newest()
    if entry is not None and newest is not None:
        console.print(f"written: {entry}; the newest is {names.checkpoint_folder(newest.name, newest.number)}")
    else:
        console.print("nothing was written" + (", as --dry-run says" if dry_run else ""))


def _known(time: float, nbytes: int, world_size: int) -> tuple[str, str, str]:
    return text.local_time(time), human_bytes(nbytes), str(world_size)
