"""``distckpt doctor``: whether a place is fit for checkpoints, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from distckpt.cli import options, text
from distckpt.storage.examine import Examination, Finding, examine

_STYLES = {"good": "green", "bad": "bold red", "careful": "yellow", "untried": "bold red"}
_GIGABYTE = 1_000_000_000


@click.command("doctor")
@click.argument("url")
@click.option(
    "--gigabytes", type=click.FloatRange(min=0), default=10.0, show_default=True, help="How large a save would be."
)
@options.as_json
@options.storage_options
@click.pass_context
def examine_place(
    ctx: click.Context, url: str, gigabytes: float, as_json: bool, storage_options: Mapping[str, Any]
) -> None:
    """Try whether checkpoints would be safe at URL, a path or a store's, and how long saves from this host would take.

    It need not exist yet. All is tried in a folder of its own, which is removed again. Exit status 0 if it is safe, 1 if it
    is not, 2 if it could not be tried.
    """
    found = examine(url, storage_options, bool if as_json else _tell)
    seconds = found.speed.save_seconds(round(gigabytes * _GIGABYTE)) if found.is_safe else None
    if as_json:
        shown = {**asdict(found), "gigabytes": gigabytes, "save_seconds": seconds}
        text.print_json(shown)
    else:
        _conclude(found, gigabytes, seconds)
    if not found.is_safe:
        ctx.exit(2 if found.is_safe is None else 1)


def _tell(finding: Finding) -> None:
    console = text.console()
    line = Text.assemble((f"{finding.verdict:8}", _STYLES[finding.verdict]), f"{finding.what}: {finding.found}")
    console.print(line, overflow="fold")
    if finding.advice:
        console.print(Text(f"        → {finding.advice}"), overflow="fold")


def _conclude(found: Examination, gigabytes: float, seconds: float | None) -> None:
    console = text.console()
    console.print()
    if found.is_safe is None:
        console.print(f"It could not be tried whether {found.url} is safe.", soft_wrap=True)
    elif not found.is_safe:
        console.print(f"Checkpoints would NOT be safe at {found.url}.", soft_wrap=True)
    else:
        console.print(f"Checkpoints are safe at {found.url}, as far as it can be tried from one host.", soft_wrap=True)
    if seconds is not None:
        console.print(f"A save of {gigabytes:g} GB from this host alone takes about {text.duration(seconds)}.")
