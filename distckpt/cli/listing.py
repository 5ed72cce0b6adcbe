"""``distckpt ls``: which checkpoints a directory has. Reads the log, and looks whether the manifests are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import msgspec
from rich.text import Text

from distckpt.cli import options, text
from distckpt.cli.grouping import in_words
from distckpt.cli.tables import Table
from distckpt.directory.exports import read_export
from distckpt.directory.leases import readers_of
from distckpt.directory.newest import has_manifest
from distckpt.directory.pins import pins
from distckpt.directory.reports import read_reports
from distckpt.directory.strays import read_run
from distckpt.directory.tags import tags_by_attempt
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.report import with_reports
from distckpt.storage import Store, join, open_store
from distckpt.terminal.sizes import counted, human_bytes

READERS = 8
"""Exports that are looked at at once."""

_STYLES = {"newest": "bold green", "preserved": "cyan", "retiring": "dim", "missing": "bold red"}


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint and the words that say how it stands: newest, active, preserved, retiring, missing, pinned, leased."""

    record: CheckpointRecord
    marks: tuple[str, ...]

    @property
    def name(self) -> str:
        """``ckpt-42``."""
        return names.checkpoint_folder(self.record.name, self.record.number)


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside the log about its checkpoints, by attempt: pins, who reads them, groups in words, bytes of exports,
    and what people call them.

    An export that cannot be read has None.
    """

    pins: Mapping[str, Lease]
    readers: Mapping[str, tuple[Lease, ...]]
    groups: Mapping[str, Sequence[str]]
    exports: Mapping[str, int | None]
    tags: Mapping[str, Sequence[str]]


@click.command("ls")
@click.argument("directory", metavar="DIR")
@click.option("--all", "everything", is_flag=True, help="Leftovers too: unfinished saves and all else that gc deletes.")
@options.as_json
@options.storage_options
@click.pass_context
def list_checkpoints(
    ctx: click.Context, directory: str, everything: bool, as_json: bool, storage_options: Mapping[str, Any]
) -> None:
    """List the checkpoints of a directory, oldest first, the newest one last, and what they take.

    Active ones take part in retention, preserved ones are kept for good, retiring ones are being deleted. Missing ones
    are in the log, but were deleted by other means than distckpt. Pinned and leased ones are kept while they are so; a
    reader that was killed leaves its lease for a while. Exit status 1 if a part of the log cannot be read.
    """
    store = open_store(directory, storage_options)
    reports = [one.report for one in read_reports(store).found]  # before the log, into which they go
    state, missing, unreadable = _settled(store)
    state = with_reports(state, reports)
    beside = Beside(
        pins(store), readers_of(store), in_words(store), _exports(store, state, missing), tags_by_attempt(store)
    )
    listed = in_order(state, missing, beside.pins.keys(), beside.readers.keys())
    if not listed and not unreadable:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
    left = _leftovers(store) if everything else None
    if as_json:
        checkpoints = [_as_json(one, beside) for one in listed]
        shown = {"directory": store.url, "ended": state.ended, "checkpoints": checkpoints}
        shown |= {"totals": _totals(listed, beside)} | ({} if left is None else {"leftovers": left})
        text.print_json({**shown, "unreadable": unreadable} if unreadable else shown)
    else:
        _print(listed, beside)
        if left is not None:
            _print_leftovers(left)
        for one in unreadable:
            text.console().print(Text(f"not listed: {one}", style="bold red"), overflow="fold")
    if unreadable:
        ctx.exit(1)


def _settled(store: Store) -> tuple[State, frozenset[str], list[str]]:
    """The state of the log, which attempts are missing that it says may be opened, and what of the log cannot be read.

    That is its newest entries, which may say what no older one does, and pages.
    """
    tail = read_run(store)
    state, lost = tail.readable()
    while missing := frozenset(record.attempt for record in state.newest_first() if not has_manifest(store, record)):
        tail = read_run(store)
        again, lost = tail.readable()
        if missing <= again.alive().keys():
            break
        state = again  # some have been retired since the log was read
    entries = [f"{join(store.url, error.path)}: {error.reason}" for error in tail.damaged]
    return state, missing, [*entries, *(str(one.error) for one in lost)]


def in_order(
    state: State,
    missing: Collection[str] = frozenset(),
    pinned: Collection[str] = frozenset(),
    leased: Collection[str] = frozenset(),
) -> list[Listed]:
    """Every checkpoint of the log once: retiring ones first, then the others in the order in which they were saved.

    ``missing`` are attempts of which there is no manifest; the newest is the newest of the others. ``pinned`` are attempts
    that have a pin beside the log, ``leased`` those that somebody reads.
    """
    active = {record.attempt for record in state.active}
    preserved = {record.attempt for record in state.preserved}
    newest = next((record for record in state.newest_first() if record.attempt not in missing), None)
    older = [record for record in reversed(state.newest_first()) if record.attempt not in active]
    listed = [Listed(record, ("retiring", *["leased"] * (record.attempt in leased))) for record in state.retiring]
    for record in (*older, *state.active):
        marks = ["newest"] if record == newest else ["active"] if record.attempt in active else []
        marks = ["missing"] if record.attempt in missing else marks
        marks += ["preserved"] if record.attempt in preserved else []
        marks += ["pinned"] if record.pinned or record.attempt in pinned else []
        marks += ["leased"] if record.attempt in leased else []
        listed.append(Listed(record, tuple(marks)))
    return listed


def _exports(store: Store, state: State, missing: Collection[str]) -> dict[str, int | None]:
    """Bytes of the exports that there are."""
    records = [record for record in state.newest_first() if record.attempt not in missing]

    def read(record: CheckpointRecord) -> int | None:
        try:
            export = read_export(store, names.attempt_folder(record.name, record.number, record.attempt))
        except (DamagedError, StorageError):
            return None
        return 0 if export is None else sum(file.size for _, file in export.files())

    with ThreadPoolExecutor(READERS) as pool:
        sizes = dict(zip((record.attempt for record in records), pool.map(read, records), strict=True))
    return {attempt: size for attempt, size in sizes.items() if size != 0}


def _leftovers(store: Store) -> list[dict[str, Any]]:
    """All that ``distckpt gc`` would delete sooner or later."""
    from distckpt.directory.collect import LEASED, Survey  # who lists checkpoints alone does not wait for it
    from distckpt.directory.garbage import GARBAGE_SECONDS

    what = Survey(store, GARBAGE_SECONDS).look()
    return [
        {"path": one.left.path, "kind": one.kind, "nbytes": one.left.nbytes, "modified": one.left.modified}
        for one in (*what.found, *what.later, *what.unsure)
        if one.kind != LEASED
    ]


def _as_json(listed: Listed, beside: Beside) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(listed.record)
    attempt = listed.record.attempt
    return {
        "checkpoint": listed.name,
        "state": list(listed.marks),
        **record,
        "tags": list(beside.tags.get(attempt, ())),
        "pin": text.pin_as_json(beside.pins.get(attempt)),
        "readers": [lease.holder for lease in beside.readers.get(attempt, ())],
        "groups": list(beside.groups.get(attempt, ())),
        "exported": beside.exports.get(attempt, 0),
    }


def _totals(listed: Sequence[Listed], beside: Beside) -> dict[str, int]:
    """How many there are that may be opened, of which size; what is being deleted; and what exports take."""
    there = [one.record for one in listed if not {"retiring", "missing"} & set(one.marks)]
    going = [one.record for one in listed if "retiring" in one.marks]
    return {
        "checkpoints": len(there),
        "nbytes": sum(record.nbytes for record in there),
        "retiring": len(going),
        "retiring_nbytes": sum(record.nbytes for record in going),
        "exported": sum(size or 0 for size in beside.exports.values()),
    }


def _print(listed: Sequence[Listed], beside: Beside) -> None:
    metrics = any(one.record.metrics for one in listed)
    grouped = any(one.record.attempt in beside.groups for one in listed)
    exported = any(one.record.attempt in beside.exports for one in listed)
    named = any(one.record.attempt in beside.tags for one in listed)
    columns = ["checkpoint", *["tags"] * named, "state", "saved", "size", *["export"] * exported, "ranks", "attempt"]
    table = Table(
        [*columns, *["groups"] * grouped, *["metrics"] * metrics],
        right=["size", "export", "ranks"],
        least=["attempt", "ranks", "export", "groups", "saved", "metrics", "size"],
    )
    for one in listed:
        record = one.record
        cells: list[str | Text] = [
            one.name,
            *["\n".join(beside.tags.get(record.attempt, ()))] * named,
            Text(", ".join(one.marks), style=_STYLES.get(one.marks[0], "")),
            text.local_time(record.time),
            human_bytes(record.nbytes),
            *[_export(beside.exports.get(record.attempt, 0))] * exported,
            str(record.world_size),
            record.attempt[: record.attempt.index("-") + 9],
        ]
        cells += ["\n".join(beside.groups.get(record.attempt, ()))] * grouped + [_metrics(record)] * metrics
        table.add_row(*cells)
    console = text.console()
    console.print(table)
    console.print()
    console.print(", ".join(_sums(_totals(listed, beside))))


def _sums(totals: Mapping[str, int]) -> Iterator[str]:
    yield f"{counted(totals['checkpoints'], 'checkpoint')} of {human_bytes(totals['nbytes'])}"
    if totals["retiring"]:
        yield f"{totals['retiring']:,} retiring of {human_bytes(totals['retiring_nbytes'])}"
    if totals["exported"]:
        yield f"exports of {human_bytes(totals['exported'])}"


def _export(nbytes: int | None) -> str:
    return "damaged" if nbytes is None else human_bytes(nbytes) if nbytes else ""


def _print_leftovers(left: Sequence[Mapping[str, Any]]) -> None:
    console = text.console()
    console.print()
    if not left:
        console.print("no leftovers")
        return
    table = Table(["leftover", "what", "size"], right=["size"], least=["what"])
    for one in left:
        table.add_row(one["path"], one["kind"], human_bytes(one["nbytes"]))
    console.print(table)
    console.print(
        f"{counted(len(left), 'leftover')} of {human_bytes(sum(one['nbytes'] for one in left))}: see distckpt gc"
    )


def _metrics(record: CheckpointRecord) -> str:
    return "\n".join(f"{name}={value:.5g}" for name, value in record.metrics.items())
