"""``distckpt rm``: take checkpoints out of the log, and delete them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.directory.chosen import choose_in
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.directory.remove import Removed, plan_removal, readers, remove
from distckpt.errors import CheckpointNotFoundError
from distckpt.format import names
from distckpt.storage import Store, join, open_store, split_path
from distckpt.terminal.bar import pulse
from distckpt.terminal.sizes import counted, human_bytes

LOOK_SECONDS = 10.0
"""How often it is looked while somebody reads: more often than anybody renews a lease."""


@click.command("rm")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be removed; change nothing.")
@click.option("--force", is_flag=True, help="Also the newest, and also when a job may be running: it is stopped.")
@click.option("--wait", is_flag=True, help="While somebody reads one, stay and look again. Ctrl-C does no harm.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@options.as_json
@options.storage_options
def remove_checkpoints(
    paths: tuple[str, ...],
    dry_run: bool,
    force: bool,
    wait: bool,
    yes: bool,
    as_json: bool,
    storage_options: Mapping[str, Any],
) -> None:
    """Take checkpoints out of the log of their directory, and delete them.

    Pinned ones and those that somebody is reading are refused, and without --force the newest, and those of a job that may
    be running. All PATHs are of one directory. Killed in between, nothing half can be read, and `distckpt gc` or the next
    start of the job goes on.
    """
    store, folders = _one_directory(paths, storage_options)
    chosen, leases = [choose_in(store, folder) for folder in folders], Leases(store)
    with pulse("waiting for readers", shown=wait):
        while wait and readers(leases, chosen):
            time.sleep(LOOK_SECONDS)
    tail, records = plan_removal(chosen, force, time.time(), leases)
    nbytes = sum(record.nbytes for record in records)
    what = f"{counted(len(folders), 'checkpoint')} of {store.url}, {human_bytes(nbytes)}: {', '.join(folders)}"
    removed = [Removed(record, "nothing was changed, as --dry-run says") for record in records]
    if not dry_run:
        if not yes:
            _ask(what)
        removed = remove(store, tail, records, time.time, leases)
    if as_json:
        text.print_json({"directory": store.url, "checkpoints": [_as_json(one) for one in removed]})
        return
    text.console().print(f"{'would remove' if dry_run else 'removed'} {what}", soft_wrap=True)
    for one in removed if not dry_run else ():
        if one.left:
            path = join(store.url, names.checkpoint_folder(one.record.name, one.record.number))
            left = f"{path}: out of the log, and not deleted yet: {one.left}. `distckpt gc` or the job will"
            text.console().print(Text(left), overflow="fold")


def _one_directory(paths: tuple[str, ...], storage_options: Mapping[str, Any]) -> tuple[Store, list[str]]:
    parts = [split_path(path) for path in paths]
    directories = {directory for directory, _ in parts}
    if len(directories) > 1:
        raise ValueError(f"all checkpoints must be of one directory, not of {', '.join(sorted(directories))}")
    [directory] = directories
    store = open_store(directory, storage_options)
    is_run = read_tail(store).entry is not None
    for path, (_, folder) in zip(paths, parts, strict=True):
        is_checkpoint = names.parse_checkpoint(folder) is not None
        if not (is_run and is_checkpoint):
            _refuse_directory(path, storage_options)
        if not is_checkpoint:
            raise CheckpointNotFoundError(path, "not the path of a checkpoint, such as /shared/run-7/ckpt-42")
    return store, list(dict.fromkeys(folder for _, folder in parts))


def _refuse_directory(path: str, storage_options: Mapping[str, Any]) -> None:
    """CheckpointNotFoundError if it is itself a directory with checkpoints, as ``Checkpoint.save`` makes one: v-1/saved-1."""
    store = open_store(path, storage_options)
    tail = read_tail(store)
    if tail.entry is None:
        return
    newest = tail.newest()
    such = ""
    if newest is not None:
        such = f" Give the path of one, such as {join(store.url, names.checkpoint_folder(newest.name, newest.number))}."
    message = f"it is a directory with checkpoints, and none itself.{such} To have all of it gone, delete the folder"
    raise CheckpointNotFoundError(path, message)


def _ask(what: str) -> None:
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on: pass -y")
    click.confirm(f"Remove {what}?", abort=True, err=True)


def _as_json(one: Removed) -> dict[str, Any]:
    folder = names.checkpoint_folder(one.record.name, one.record.number)
    deleted = not one.left
    return {
        "checkpoint": folder,
        "attempt": one.record.attempt,
        "nbytes": one.record.nbytes,
        "deleted": deleted,
        "reason": one.left,
    }
