"""``distckpt gc``: delete what dead writers have left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.directory.collect import Garbage, delete, survey, turn_away
from distckpt.directory.garbage import GARBAGE_SECONDS
from distckpt.storage import open_store
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes


@click.command("gc")
@click.argument("directory", metavar="DIR")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; change nothing.")
@click.option(
    "--older-than",
    metavar="AGE",
    default="1h",
    callback=options.seconds,
    help="Only what nobody has touched for so long, such as 30m, 12h or 7d; an hour by default, and at least.",
)
@click.option(
    "--force",
    is_flag=True,
    help="No job runs here: delete what the last one has begun too, and what is younger than an hour. A job that "
    "runs all the same is stopped.",
)
@options.as_json
@options.storage_options
@click.pass_context
def collect(
    ctx: click.Context,
    directory: str,
    dry_run: bool,
    older_than: float,
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, Any],
) -> None:
    """Delete what nothing refers to: unfinished saves of former runs, interrupted writes and uploads, retired checkpoints
    that nobody reads, expired leases.

    By the rules of a job that runs, which does the same from time to time, so that it may run meanwhile: what its newest
    start has begun is left alone. Exit status 1 if something could not be deleted.
    """
    if older_than < GARBAGE_SECONDS and not force:
        raise ValueError("what is younger than an hour may be of somebody who writes just now: pass --force too")
    store = open_store(directory, storage_options)
    what = survey(store, older_than, time.time())
    garbage = what.found
    if force and what.later:
        if not dry_run:
            turn_away(store, what.tail, time.time())
        garbage = (*what.found, *what.later)
    later = () if force else what.later
    failed: dict[str, str] = {}
    if not dry_run:
        total, done = sum(one.left.nbytes for one in garbage), 0
        with bar("deleting") as update:

            def gone(one: Garbage) -> None:
                nonlocal done
                done += one.left.nbytes
                update(done, total)

            failed = delete(store, garbage, older_than, gone)
    if as_json:
        found = [_as_json(one, "" if dry_run else failed.get(one.left.path)) for one in garbage]
        text.print_json({"directory": store.url, "garbage": found, "later": [_as_json(one, "") for one in later]})
    else:
        _print(garbage, later, failed, dry_run)
    if failed:
        ctx.exit(1)


def _as_json(one: Garbage, failure: str | None) -> dict[str, Any]:
    """``failure`` is None if it is gone, '' if it was not tried."""
    return {
        "path": one.left.path,
        "kind": one.kind,
        "nbytes": one.left.nbytes,
        "modified": one.left.modified,
        "deleted": failure is None,
        "reason": failure or "",
    }


def _print(garbage: Sequence[Garbage], later: Sequence[Garbage], failed: Mapping[str, str], dry_run: bool) -> None:
    console = text.console()
    if garbage:
        console.print(_table(garbage))
    gone = [one for one in garbage if one.left.path not in failed]
    size = human_bytes(sum(one.left.nbytes for one in gone))
    if dry_run:
        console.print(f"{counted(len(gone), 'thing')} would be deleted, {size}; nothing was, as --dry-run says")
    else:
        console.print(f"{counted(len(gone), 'thing')} deleted, {size}" if garbage else "there is nothing to delete")
    for path, reason in failed.items():
        console.print(Text(f"{path} could not be deleted: {reason}"), overflow="fold")
    if later:
        console.print()
        console.print(_table(later))
        console.print(
            "left alone, as a job that runs may still need it. If none runs, pass --force; the next start does it, too"
        )


def _table(garbage: Sequence[Garbage]) -> Any:
    table = text.table(["path", "what", "size", "age"], right=["size", "age"])
    for one in garbage:
        table.add_row(one.left.path, one.kind, human_bytes(one.left.nbytes), _age(one.left.modified))
    return table


def _age(modified: float) -> str:
    return text.duration(max(0.0, time.time() - modified)) if modified else ""
