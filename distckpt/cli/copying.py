"""``distckpt cp``: checkpoints from one store to another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory.by_hand import check_quiet
from distckpt.directory.chosen import refuse_checkpoint
from distckpt.directory.copy import Copied, Copying, chosen, origin
from distckpt.directory.log import read_tail
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.storage import join, open_store
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes

_STYLES = {"copied": "green", "there already": "dim", "passed over": "yellow", "vanished": "yellow"}


def _since(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, float] | None:
    if value is None:
        return None
    if value.isdecimal():
        return "number", float(value)
    try:
        return "time", datetime.fromisoformat(value).timestamp()
    except ValueError as error:
        message = f"{value!r} is neither a number nor a time, such as 2026-11-21 or 2026-11-21T05:41"
        raise click.BadParameter(message, ctx, parameter) from error


@click.command("cp")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--newest", is_flag=True, help="The newest checkpoint of SRC alone.")
@click.option("--since", metavar="NUMBER|TIME", callback=_since, help="Only those from this number, or time, on.")
@click.option("--force", is_flag=True, help="Also where a job may be saving to DST: it is stopped with a FencedError.")
@options.as_json
@options.storage_options
@options.destination_options
@click.pass_context
def copy_checkpoints(
    ctx: click.Context,
    source: str,
    destination: str,
    newest: bool,
    since: tuple[str, float] | None,
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, Any],
    destination_options: Mapping[str, Any],
) -> None:
    """Copy checkpoints, with their exports, to a directory on any store.

    SRC is a directory or one checkpoint, DST a directory, new or with a log. Every byte is checked on its way, and each
    checkpoint committed at DST once all of it is there, so that a copy that was interrupted goes on where it stopped. SRC
    may be written to meanwhile: what is copied is leased, and what retires all the same is left out. Within one object
    store the server copies.

    Exit status 1 if something is damaged at SRC, 2 if nothing could be done.
    """
    wanted = chosen(origin(source, storage_options), since, newest)
    target = open_store(destination, destination_options)
    if target.url == wanted.store.url:
        raise ValueError(f"{target.url} is source and destination")
    refuse_checkpoint(target, destination_options)
    tail = read_tail(target)
    if tail.damaged:
        raise DamagedError(join(target.url, tail.damaged[0].path), "the newest entries of the log cannot be read")
    if not force:
        check_quiet(target, tail, time.time(), "copying")
    began = time.monotonic()
    with bar(f"copying to {target.url}") as update:
        copying = Copying(wanted, target, tail, time.time, update)
        with contextlib.closing(copying):
            copied = [copying.copy(one) for one in wanted.wanted]
    seconds = time.monotonic() - began
    if as_json:
        shown = [_as_json(one) for one in copied]
        text.print_json(
            {"source": wanted.store.url, "destination": target.url, "seconds": seconds, "checkpoints": shown}
        )
    else:
        _print(copied, target.url, seconds)
    if any(one.fate == "damaged" for one in copied):
        ctx.exit(1)


def _as_json(one: Copied) -> dict[str, Any]:
    return {
        "checkpoint": names.checkpoint_folder(one.record.name, one.record.number),
        "attempt": one.record.attempt,
        "fate": one.fate,
        "reason": one.reason,
        "nbytes": one.nbytes,
        "found": one.found,
        "by_server": one.by_server,
        "base": one.base,
    }


def _print(copied: Sequence[Copied], url: str, seconds: float) -> None:
    console = text.console()
    table = Table(["checkpoint", "", "size", "there already"], right=["size", "there already"])
    for one in copied:
        folder = names.checkpoint_folder(one.record.name, one.record.number)
        fate = Text(one.fate, style=_STYLES.get(one.fate, "bold red"))
        found = human_bytes(one.found) if one.found else ""
        table.add_row(folder, fate, human_bytes(one.nbytes or one.record.nbytes), found)
    console.print(table)
    for one in copied:
        if one.reason:
            folder = names.checkpoint_folder(one.record.name, one.record.number)
            console.print(Text(f"{folder}: {one.fate}: {one.reason}"), overflow="fold")
    moved = sum(one.nbytes - one.found for one in copied)
    by_server = sum(one.by_server for one in copied)
    rate = f", {human_bytes(round(moved / seconds))}/s" if seconds >= 0.01 else ""
    how = f", {human_bytes(by_server)} of it by the server" if by_server else ""
    number = counted(sum(one.fate == "copied" for one in copied), "checkpoint")
    console.print(
        f"{number} copied to {url}: {human_bytes(moved)} in {text.duration(seconds)}{rate}{how}", soft_wrap=True
    )
    text.print_bases(
        (one.base for one in copied), "is not copied with them: copy it too, and give the copy as frozen_from"
    )
