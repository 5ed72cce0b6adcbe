"""``distckpt verify``: read every byte again and compare it with what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.listing import in_order
from distckpt.directory.locate import Located, locate, located, read_index
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.verify import Damage, VerifyReport, verify
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord
from distckpt.storage import Store, join, open_store
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes

MOST_DAMAGES = 20


@click.command("verify")
@click.argument("path")
@options.as_json
@options.storage_options
@click.pass_context
def verify_checkpoints(ctx: click.Context, path: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Read every byte of a checkpoint, or of all that a directory has, and check it.

    Of a directory, active and preserved checkpoints are checked, and the log itself. Exit status 0 if all is as it was
    written, 1 if damage was found, 2 if there is nothing to check.
    """
    reports = []
    for report in _reports(path, storage_options):
        reports.append(report)
        if not as_json:
            _print(report)
    if as_json:
        text.print_json([{"good": report.good, **asdict(report)} for report in reports])
    else:
        text.print_bases((report.base for report in reports), "is not looked at here")
    if not all(report.good for report in reports):
        ctx.exit(1)


def _reports(path: str, storage_options: Mapping[str, Any]) -> Iterator[VerifyReport]:
    store = open_store(path, storage_options)
    tail = read_tail(store)
    if tail.entry is None:
        yield check(locate(path, storage_options))
        return
    state, lost = tail.readable()
    records = [one.record for one in in_order(state) if "retiring" not in one.marks]
    if not records and not lost:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
    yield from _log_report(store, tail)
    for one in lost:
        yield _unreadable(join(store.url, names.page_path(one.page.id)), one.error)
    for record in records:
        report = _check_record(store, record)
        # Retention may have taken it away while it was being read.
        if report.good or record.attempt in read_tail(store).having_attempt(record.attempt).alive():
            yield report


def _log_report(store: Store, tail: Tail) -> Iterator[VerifyReport]:
    if tail.damaged:
        damages = tuple(Damage(error.path, error.key, error.reason) for error in tail.damaged)
        yield VerifyReport(join(store.url, "_log"), 0, 0, 0, damages)


def _check_record(store: Store, record: CheckpointRecord) -> VerifyReport:
    path = join(store.url, f"{record.name}-{record.number}")
    try:
        return check(located(store, record))
    except DamagedError as error:
        return _unreadable(path, error)


def check(where: Located) -> VerifyReport:
    """Verify one checkpoint, with a bar that shows how far it is where there is a terminal."""
    try:
        index = read_index(where)
    except DamagedError as error:
        return _unreadable(where.path, error)
    with bar(where.path.rpartition("/")[2]) as update:
        return verify(where, index, update)


def _unreadable(path: str, error: DamagedError | StorageError) -> VerifyReport:
    """What there is to say when manifest, index or a page cannot be read: then nobody knows what should be there."""
    damage = Damage(error.path, error.key, error.reason) if isinstance(error, DamagedError) else None
    return VerifyReport(path, 0, 0, 0, (damage or Damage(path, None, f"cannot be read: {error}"),))


def _print(report: VerifyReport) -> None:
    console = text.console()
    name = report.path.rpartition("/")[2]
    if report.good:
        shards, keys = counted(report.shards, "shard"), counted(report.keys, "key")
        console.print(
            Text.assemble(f"{name}  ", ("good", "green"), f"  {human_bytes(report.nbytes)} read, {shards}, {keys}")
        )
        return
    console.print(Text.assemble(f"{name}  ", ("DAMAGED", "bold red"), f"  {counted(len(report.damages), 'finding')}"))
    for damage in report.damages[:MOST_DAMAGES]:
        console.print(Text(f"  {damage}"), overflow="fold")
    if len(report.damages) > MOST_DAMAGES:
        console.print(f"  and {counted(len(report.damages) - MOST_DAMAGES, 'more finding')}; --json shows them all")
