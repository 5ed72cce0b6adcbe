"""``distckpt ls``: which checkpoints a directory has. Reads the log, and looks whether the manifests are there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import click
import msgspec
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.grouping import in_words
from distckpt.cli.tables import Table
from distckpt.directory.newest import has_manifest
from distckpt.directory.pages import Lost
from distckpt.directory.pins import pins
from distckpt.directory.reports import read_reports
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError
from distckpt.format import names
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.report import with_reports
from distckpt.storage import Store, open_store
from distckpt.terminal.sizes import human_bytes

_STYLES = {"newest": "bold green", "preserved": "cyan", "retiring": "dim", "missing": "bold red"}


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint and the words that say how it stands: newest, active, preserved, retiring, missing, pinned."""

    record: CheckpointRecord
    marks: tuple[str, ...]

    @property
    def name(self) -> str:
        """``ckpt-42``."""
        return names.checkpoint_folder(self.record.name, self.record.number)


@click.command("ls")
@click.argument("directory", metavar="DIR")
@options.as_json
@options.storage_options
@click.pass_context
def list_checkpoints(ctx: click.Context, directory: str, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """List the checkpoints of a directory, oldest first, the newest one last.

    Active ones take part in retention, preserved ones are kept for good, retiring ones are being deleted. Missing ones
    are in the log, but were deleted by other means than distckpt. Exit status 1 if a part of the log cannot be read.
    """
    store = open_store(directory, storage_options)
    reports = [one.report for one in read_reports(store).found]  # before the log, into which they go
    state, missing, lost = _settled(store)
    state = with_reports(state, reports)
    pinned, groups = pins(store), in_words(store)
    listed = in_order(state, missing, pinned.keys())
    if not listed and not lost:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
    if as_json:
        checkpoints = [_as_json(one, pinned, groups) for one in listed]
        shown = {"directory": store.url, "ended": state.ended, "checkpoints": checkpoints}
        text.print_json({**shown, "unreadable": [str(one.error) for one in lost]} if lost else shown)
    else:
        _print(listed, groups)
        for one in lost:
            text.console().print(Text(f"not listed: {one.error}", style="bold red"), overflow="fold")
    if lost:
        ctx.exit(1)


def _settled(store: Store) -> tuple[State, frozenset[str], tuple[Lost, ...]]:
    """The state of the log, which attempts are missing that it says may be opened, and what of the log cannot be read."""
    state, lost = read_run(store).readable()
    while missing := frozenset(record.attempt for record in state.newest_first() if not has_manifest(store, record)):
        again, lost = read_run(store).readable()
        if missing <= again.alive().keys():
            break
        state = again  # some have been retired since the log was read
    return state, missing, lost


def in_order(
    state: State, missing: Collection[str] = frozenset(), pinned: Collection[str] = frozenset()
) -> list[Listed]:
    """Every checkpoint of the log once: retiring ones first, then the others in the order in which they were saved.

    ``missing`` are attempts of which there is no manifest; the newest is the newest of the others. ``pinned`` are attempts
    that have a pin beside the log.
    """
    active = {record.attempt for record in state.active}
    preserved = {record.attempt for record in state.preserved}
    newest = next((record for record in state.newest_first() if record.attempt not in missing), None)
    older = [record for record in reversed(state.newest_first()) if record.attempt not in active]
    listed = [Listed(record, ("retiring",)) for record in state.retiring]
    for record in (*older, *state.active):
        marks = ["newest"] if record == newest else ["active"] if record.attempt in active else []
        marks = ["missing"] if record.attempt in missing else marks
        marks += ["preserved"] if record.attempt in preserved else []
        marks += ["pinned"] if record.pinned or record.attempt in pinned else []
        listed.append(Listed(record, tuple(marks)))
    return listed


def _as_json(listed: Listed, pinned: Mapping[str, Lease], groups: Mapping[str, list[str]]) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(listed.record)
    attempt = listed.record.attempt
    pin = text.pin_as_json(pinned.get(attempt))
    return {
        "checkpoint": listed.name, "state": list(listed.marks), **record, "pin": pin, "groups": groups.get(attempt, [])
    }  # fmt: skip


def _print(listed: Collection[Listed], groups: Mapping[str, list[str]]) -> None:
    columns = ["checkpoint", "state", "saved", "size", "ranks", "attempt"]
    metrics = any(one.record.metrics for one in listed)
    grouped = any(one.record.attempt in groups for one in listed)
    columns += ["groups"] * grouped + ["metrics"] * metrics
    table = Table(
        columns,
        right=["size", "ranks"],
        least=["attempt", "ranks", "groups", "saved", "metrics", "size"],
    )
    for one in listed:
        record = one.record
        cells: list[str | Text] = [
            one.name,
            Text(", ".join(one.marks), style=_STYLES.get(one.marks[0], "")),
            text.local_time(record.time),
            human_bytes(record.nbytes),
            str(record.world_size),
            record.attempt[: record.attempt.index("-") + 9],
        ]
        cells += ["\n".join(groups.get(record.attempt, ()))] * grouped + [_metrics(record)] * metrics
        table.add_row(*cells)
    text.console().print(table)


def _metrics(record: CheckpointRecord) -> str:
    return "\n".join(f"{name}={value:.5g}" for name, value in record.metrics.items())
