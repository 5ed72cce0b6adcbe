"""``distckpt gc``: delete what dead writers have left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.tables import Table
from distckpt.directory.collect import Collection, Garbage, Survey, delete, turn_away
from distckpt.directory.garbage import GARBAGE_SECONDS
from distckpt.directory.stillness import elapsed
from distckpt.errors import CheckpointNotFoundError
from distckpt.storage import open_store
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes

LOOK_SECONDS = 10.0
"""How often it is looked while something is watched: more often than anybody renews a lease."""


@click.command("gc")
@click.argument("directory", metavar="DIR")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; change nothing.")
@click.option(
    "--older-than",
    metavar="AGE",
    default="1h",
    callback=options.seconds,
    help="For how long nobody may touch it while we look, such as 30m, 12h or 7d; an hour by default, and at least.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="Stay and look again and again, for --older-than at most, to be sure that nobody is at it. Ctrl-C does no harm.",
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
    wait: bool,
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, Any],
) -> None:
    """Delete what nothing refers to: unfinished saves of former runs, interrupted writes and uploads, retired checkpoints
    that nobody reads, expired leases.

    By the rules of a job that runs, which does the same from time to time, so that it may run meanwhile: what its newest
    start has begun is left alone, and so is what has retired there. No clock is asked how old something is: what somebody
    may be writing or reading just now goes once it has been seen unchanged for long enough, which a job does by itself, and
    this command with --wait. Exit status 1 if something could not be deleted.
    """
    if older_than < GARBAGE_SECONDS and not force:
        raise ValueError("who writes just now may need an hour for a single object: pass --force too")
    store = open_store(directory, storage_options)
    what = _watched(Survey(store, older_than), wait)
    if what.tail.entry is None and not (what.found or what.later or what.unsure):
        raise CheckpointNotFoundError(store.url, "no run has saved here")
    garbage, later, unsure = what.found, what.later, what.unsure
    if force and later:
        if not dry_run:
            turn_away(store, what.tail, time.time())
        garbage = (*garbage, *(one for one in later if not one.left.wait))
        unsure, later = (*unsure, *(one for one in later if one.left.wait)), ()
    failed: dict[str, str] = {}
    if not dry_run:
        total, done = sum(one.left.nbytes for one in garbage), 0
        with bar("deleting") as update:

            def gone(one: Garbage) -> None:
                nonlocal done
                done += one.left.nbytes
                update(done, total)

            failed = delete(garbage, gone)
    if as_json:
        found = [_as_json(one, "" if dry_run else failed.get(one.left.path)) for one in garbage]
        left = {"later": [_as_json(one, "") for one in later], "unsure": [_as_json(one, "") for one in unsure]}
        text.print_json({"directory": store.url, "garbage": found, **left})
    else:
        _print(garbage, failed, dry_run)
        _print_left(later, "a job that runs may still need it. If none runs, pass --force; the next start does it, too")
        sure = text.duration(max((one.left.wait for one in unsure), default=0.0))
        _print_left(
            unsure, f"somebody may be at it. --wait looks whether it changes, for {sure}; a job that runs does, too"
        )
    if failed:
        ctx.exit(1)


def _watched(survey: Survey, wait: bool) -> Collection:
    """What there is; if it may take long, once nothing is unsure any more, or has been changed again and again."""
    what = survey.look()
    total = what.wait
    end = elapsed() + total
    with bar("watching", sized=False) as update:
        while wait and what.wait and elapsed() < end + LOOK_SECONDS:
            time.sleep(min(what.wait, LOOK_SECONDS))
            what = survey.look()
            update(int(total - min(what.wait, total)), int(total))
    return what


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


def _print(garbage: Sequence[Garbage], failed: Mapping[str, str], dry_run: bool) -> None:
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


def _print_left(left: Sequence[Garbage], why: str) -> None:
    if left:
        console = text.console()
        console.print()
        console.print(_table(left))
        console.print(f"left alone, as {why}")


def _table(garbage: Sequence[Garbage]) -> Table:
    table = Table(["path", "what", "size", "age"], right=["size", "age"], least=["age", "what"])
    for one in garbage:
        table.add_row(one.left.path, one.kind, human_bytes(one.left.nbytes), _age(one.left.modified))
    return table


def _age(modified: float) -> str:
    return text.duration(max(0.0, time.time() - modified)) if modified else ""
