"""``distckpt import``: files of another program as a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.directory.by_hand import check_quiet
from distckpt.directory.chosen import refuse_checkpoint
from distckpt.directory.log import read_tail
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.storage import join, open_store
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("directory", metavar="DIR")
@click.option("--number", type=click.IntRange(0), metavar="N", help="The checkpoint's number; else SRC's step, or 0.")
@click.option("--name", default="ckpt", metavar="NAME", help="The checkpoint's name.", show_default=True)
@click.option(
    "--under", default="model", metavar="NAME", help="What SRC's one state dict is called.", show_default=True
)
@click.option("--leave-out", multiple=True, metavar="KEY", help="Go without what is below KEY; may be repeated.")
@click.option("--force", is_flag=True, help="Also where a job may be saving to DIR: it is stopped with a FencedError.")
@options.as_json
@options.source_options
@options.destination_options
def import_files(
    source: str,
    directory: str,
    number: int | None,
    name: str,
    under: str,
    leave_out: tuple[str, ...],
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, Any],
    destination_options: Mapping[str, Any],
) -> None:
    """Make a checkpoint of DIR of what another program has saved at SRC.

    SRC is a safetensors file, one of torch.save or of Lightning, or a folder of Hugging Face's, of Accelerate, of the
    Transformers Trainer or of torch.distributed.checkpoint. Nothing is unpickled: what only unpickling could read is
    named, and must be left out by --leave-out. It is read and written a part at a time, read again from the store, and
    committed in DIR's log once all of it is there: as its newest checkpoint, as if a run had saved it.

    Exit status 1 if SRC is damaged, 2 if nothing could be done.
    """
    from distckpt.foreign.importing import Import  # it imports torch
    from distckpt.foreign.reader import read_foreign

    if not names.is_name(name):
        raise click.BadParameter(f"{name!r} cannot be a checkpoint's name")
    store = open_store(directory, destination_options)
    refuse_checkpoint(store, destination_options)
    tail = read_tail(store)
    if tail.damaged:
        raise DamagedError(join(store.url, tail.damaged[0].path), "the newest entries of the log cannot be read")
    if not force:
        check_quiet(store, tail, time.time(), "importing")
    began = time.monotonic()
    with options.told_in_words(), read_foreign(source, storage_options, under=under, leave_out=leave_out) as reader:
        contents = reader.contents
        chosen = number if number is not None else contents.number or 0
        with bar(f"importing {reader.path}") as update:
            record = Import(reader, store, tail, name, chosen, time.time, update).run()
    seconds = time.monotonic() - began
    path = join(store.url, names.checkpoint_folder(record.name, record.number))
    if as_json:
        text.print_json(
            {
                "source": contents.path,
                "kind": contents.kind,
                "checkpoint": path,
                "attempt": record.attempt,
                "nbytes": contents.nbytes,
                "seconds": seconds,
                "tensors": list(contents.tensors),
                "values": list(contents.values),
                "left_out": dict(contents.refused),
                "notes": list(contents.notes),
            }
        )
        return
    console = text.console()
    for key, reason in contents.refused.items():
        console.print(Text(f"left out: {key}: {reason}", style="yellow"), overflow="fold")
    tensors, values = len(contents.tensors), len(contents.values)
    console.print(
        f"{path}: {counted(tensors, 'tensor')}, {human_bytes(contents.nbytes)}, and {counted(values, 'plain value')} of the "
        f"{contents.kind} {contents.path}, in {text.duration(seconds)}",
        soft_wrap=True,
    )
