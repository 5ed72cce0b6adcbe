"""Sizes, times and tables as people read them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

PIPED_COLUMNS = 100
"""Columns where the terminal does not say: enough for every table, and for most pagers."""


def local_time(seconds: float) -> str:
    """A moment, given in epoch seconds, on the clock of this machine: ``2026-11-21 05:41:49``."""
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def console() -> Console:
    """Where tables go: stdout, as wide as the terminal; colours only on a terminal."""
    columns = os.environ.get("COLUMNS", "")
    wide = None if sys.stdout.isatty() or columns.isdigit() else PIPED_COLUMNS
    return Console(file=sys.stdout, width=wide, highlight=False, emoji=False, markup=False)


def table(columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in ``right`` are aligned to the right, the first one folds where it must."""
    made = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold"
    )
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column != columns[0] and column != columns[-1],
        )
    return made


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))
