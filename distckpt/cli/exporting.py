"""``distckpt export``: a checkpoint as files of another program."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec

from distckpt.cli import options, text
from distckpt.directory.lease import hold
from distckpt.directory.locate import Located, locate, read_index
from distckpt.errors import StorageError
from distckpt.format.json.left_out import LeftOut
from distckpt.storage import canonical
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def _size(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", value.upper())
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{value!r} is no size, such as 5GB or 500MiB", ctx, parameter)
    return max(1, int(float(found[1]) * _UNITS[found[2]]))


@contextlib.contextmanager
def _held(where: Located, destination: str) -> Iterator[None]:
    """With a lease, if a log names the checkpoint and its store can be written to. Without one it may be retired meanwhile."""
    with contextlib.ExitStack() as stack:
        if not where.is_lone:
            try:
                stack.enter_context(hold(where.store, where.manifest.attempt, f"distckpt export to {destination}"))
            except StorageError as error:
                logger.warning("no lease could be written, so what is exported may be retired meanwhile: %s", error)
        yield


@click.command("export")
@click.argument("path", metavar="PATH")
@click.argument("destination", metavar="DST")
@click.option(
    "--format", "kind", default="safetensors", metavar="FORMAT", help="safetensors, torch or dcp.", show_default=True
)
@click.option("--select", default="model", metavar="KEY", help='What is below KEY; "" for all.', show_default=True)
@click.option("--leave-out", multiple=True, metavar="KEY", help="But not what is below KEY; may be repeated.")
@click.option("--max-shard-size", default="5GB", metavar="SIZE", callback=_size, help="Of one file.", show_default=True)
@options.as_json
@options.storage_options
@options.target_options
def export_files(
    path: str,
    destination: str,
    kind: str,
    select: str,
    leave_out: tuple[str, ...],
    max_shard_size: int,
    as_json: bool,
    storage_options: Mapping[str, Any],
    destination_options: Mapping[str, Any],
) -> None:
    """Write a checkpoint's tensors as files that other programs read, to the new folder DST.

    Their names are the keys below KEY, so that what a module holds is what its `load_state_dict` takes. Every byte is
    checked as it is read. DST is there whole or not at all, and never overwritten. The index has the CRC32C of each file
    and each tensor.

    Exit status 1 if the checkpoint is damaged, 2 if nothing could be done.
    """
    from distckpt.foreign.exporting import Choice, export, formats  # it imports torch
    from distckpt.state.stored import Committed

    if kind not in formats():
        raise click.BadParameter(f"{kind!r} is none of {', '.join(formats())}", param_hint="--format")
    where = locate(path, storage_options)
    stored = Committed(where, read_index(where))
    about = {"distckpt.attempt": where.manifest.attempt, "distckpt.number": str(where.manifest.number)}
    lacking = _lacking(where, select)
    began = time.monotonic()
    with options.told_in_words(), _held(where, destination), bar(f"exporting {where.path}") as update:
        choice = Choice(select, leave_out)
        written = export(stored, destination, kind, choice, max_shard_size, about, destination_options, update)
    seconds = time.monotonic() - began
    target, nbytes = canonical(destination), sum(file.size for file in written)
    if as_json:
        files = [{"name": file.name, "size": file.size, "crc32c": f"{file.crc32c:08x}"} for file in written]
        text.print_json(
            {
                "source": where.path,
                "destination": target,
                "format": kind,
                "seconds": seconds,
                "files": files,
                "left_out": msgspec.to_builtins(lacking),
            }
        )
        return
    rate = f", {human_bytes(round(nbytes / seconds))}/s" if seconds >= 0.01 else ""
    text.console().print(
        f"{target}: {counted(len(written), 'file')} of {where.path}, {human_bytes(nbytes)} in {text.duration(seconds)}{rate}",
        soft_wrap=True,
    )


def _lacking(where: Located, select: str) -> LeftOut | None:
    """What was left out of the checkpoint, and so is not in what is exported either; it is warned of."""
    left_out = where.manifest.left_out
    if left_out is None or not (select == "" or left_out.covers(select)):
        return None
    base = where.manifest.base_path
    of_base = f"; {base} has the frozen parameters" if base else ""
    logger.warning(
        "%s has not all of it: some was left out when it was saved, with %s%s", where.path, left_out, of_base
    )
    return left_out
