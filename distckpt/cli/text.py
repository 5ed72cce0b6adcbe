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

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(nbytes: int) -> str:
    """``1.3 GiB``: three or four digits, in powers of 1024."""
    power = 0
    amount = float(nbytes)
    while amount >= 1023.5 and power < len(_UNITS) - 1:
        amount, power = amount / 1024, power + 1
    digits = 1 if power and amount < 99.95 else 0
    return f"{amount:.{digits}f} {_UNITS[power]}"


def local_time(seconds: float) -> str:
    """A moment, given in epoch seconds, on the clock of this machine: ``2026-11-21 05:41:49``."""
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``3 shards``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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


def progress_console() -> Console:
    """Where progress goes: stderr."""
    return Console(file=sys.stderr)


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
