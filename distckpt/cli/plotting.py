"""``distckpt plot``: a picture of a run, from storage alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from distckpt.cli import options, text
from distckpt.directory.picture import Picture, picture_of
from distckpt.storage import open_store

KINDS = (".png", ".svg", ".pdf")


@click.command("plot")
@click.argument("directory", metavar="DIR")
@click.option("-o", "--output", metavar="FILE", help="Where to put the picture: a .png, .svg or .pdf file.")
@options.as_json
@options.storage_options_in_full
def plot(directory: str, output: str | None, as_json: bool, storage_options: Mapping[str, Any]) -> None:
    """Draw a run: how long saves took and training stood still, crashes, world sizes, checkpoint sizes, metrics.

    From storage alone, also while it goes on. With --json what the picture shows is printed; it needs no FILE then.
    Needs matplotlib: pip install 'distckpt[demo]'. Options for the store are --option KEY=VALUE here.
    """
    if output is None and not as_json:
        raise click.UsageError("give -o FILE, such as run.png, or --json")
    if output is not None and not output.lower().endswith(KINDS):
        raise click.UsageError(f"{output!r} is not a file of a kind that can be drawn: {', '.join(KINDS)}")
    picture = picture_of(open_store(directory, storage_options))
    if output is not None:
        _save(picture, output)
    if as_json:
        text.print_json(_as_json(picture))
        return
    console = text.console()
    for reason in picture.passed_over:
        console.print(f"passed over: {reason}", soft_wrap=True)
    console.print(f"drawn: {output}", soft_wrap=True)


def _save(picture: Picture, output: str) -> None:
    try:
        from distckpt.cli.drawing import draw
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError("matplotlib is not installed, which draws: pip install 'distckpt[demo]'") from error
    try:
        draw(picture).savefig(output)
    except OSError as error:
        raise ValueError(f"{output}: {error.strerror or error}") from error


def _as_json(picture: Picture) -> dict[str, Any]:
    history = picture.history
    return {
        "directory": picture.directory,
        "runs": [{**msgspec.structs.asdict(run), "state": history.state(run)} for run in history.runs],
        "checkpoints": [msgspec.to_builtins(record) for record in picture.checkpoints],
        "metrics": picture.metrics,
        "crashes": [dataclasses.asdict(crash) for crash in picture.crashes],
        "resizes": [{"number": number, "from": before, "to": now} for number, before, now in picture.resizes],
        "passed_over": list(picture.passed_over),
    }
