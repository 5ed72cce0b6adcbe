"""``distckpt pin``, ``unpin``, ``tag``, ``untag``: keep a checkpoint from retention, or name it, while the job runs too."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from distckpt.cli import options, text
from distckpt.directory.by_hand import Hand, check_nothing_sealed, check_quiet
from distckpt.directory.chosen import Chosen, choose
from distckpt.directory.pins import pin, unpin
from distckpt.directory.strays import read_run
from distckpt.directory.tags import tag, untag
from distckpt.errors import CheckpointNotFoundError
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import join, open_store, split_path


@click.command("pin")
@click.argument("path")
@click.option("--note", default="", metavar="TEXT", help="Why, for those who find the pin.")
@options.as_json
@options.storage_options
def pin_checkpoint(path: str, note: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Keep a checkpoint until it is unpinned, whatever retention says.

    A job that runs is not disturbed, and honours the pin at once. PATH may be the directory: its newest is pinned.
    """
    where = choose(path, storage_options)
    lease = pin(where.store, where.records[0].attempt, _somebody(), note, time.time())
    if as_json:
        text.print_json({"path": where.path, "attempt": lease.attempt, "pin": text.pin_as_json(lease)})
    else:
        text.console().print(f"{where.path} is {text.pin_in_words(lease)}", soft_wrap=True)


@click.command("unpin")
@click.argument("path")
@click.option(
    "--force", is_flag=True, help="Also where the log has the pin, and a job may be running, which is stopped."
)
@options.as_json
@options.storage_options
def unpin_checkpoint(path: str, force: bool, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Let retention have a checkpoint again.

    A pin that stands in the log itself is taken away too, which stops a job that runs.
    """
    where = choose(path, storage_options)
    attempts = [record.attempt for record in where.records]
    in_log = any(record.pinned for record in where.records)
    if in_log and not force:
        check_quiet(where.store, where.tail, time.time(), "taking a pin out of the log")
    was_pinned = [unpin(where.store, attempt) for attempt in attempts]
    if in_log:
        _unpin_in_log(where)
    if as_json:
        text.print_json({"path": where.path, "attempts": attempts, "was_pinned": in_log or any(was_pinned)})
    else:
        done = "is not pinned any more" if in_log or any(was_pinned) else "was not pinned"
        text.console().print(f"{where.path} {done}", soft_wrap=True)


@click.command("tag")
@click.argument("path")
@click.argument("name")
@click.option("--note", default="", metavar="TEXT", help="Why, for those who find the tag.")
@options.as_json
@options.storage_options
def tag_checkpoint(path: str, name: str, note: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Give a checkpoint a NAME that people say instead of its number, and keep it until it is untagged.

    \b
        distckpt tag /shared/run-7/ckpt-4200 best
        distckpt show /shared/run-7/best

    A job that runs is not disturbed, and honours the tag at once, as it does a pin. PATH may be the directory: its newest
    is tagged. A name that another checkpoint has is refused.
    """
    where = choose(path, storage_options)
    lease = tag(where.store, name, where.records[0].attempt, _somebody(), note, time.time())
    called = join(where.store.url, name)
    if as_json:
        text.print_json({"path": where.path, "attempt": lease.attempt, "tag": name, "called": called})
    else:
        text.console().print(f"{where.path} is {called} too", soft_wrap=True)


@click.command("untag")
@click.argument("path", metavar="DIR/NAME")
@options.as_json
@options.storage_options
def untag_checkpoint(path: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Take a tag away, and let retention have its checkpoint again."""
    directory, name = split_path(path)
    store = open_store(directory, storage_options)
    was_there = untag(store, name)
    if not was_there and read_run(store).entry is None:
        raise CheckpointNotFoundError(join(store.url, name), "no run has saved there")
    if as_json:
        text.print_json({"directory": store.url, "tag": name, "was_tagged": was_there})
    else:
        done = "is no tag any more" if was_there else "was no tag"
        text.console().print(f"{join(store.url, name)} {done}", soft_wrap=True)


def _unpin_in_log(where: Chosen) -> None:
    check_nothing_sealed(where.store, where.tail)

    def without(records: tuple[CheckpointRecord, ...]) -> tuple[CheckpointRecord, ...]:
        return tuple(
            msgspec.structs.replace(record, pinned=False) if record in where.records else record for record in records
        )

    state: State = where.tail.having_numbers(where.records[0].number)
    changed = msgspec.structs.replace(state, active=without(state.active), preserved=without(state.preserved))
    Hand(where.store, where.tail, "unpin").write("pin", changed, time.time())


def _somebody() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return socket.gethostname()
