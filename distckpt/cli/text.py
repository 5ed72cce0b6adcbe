"""Sizes, times and tables as people read them."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import click
from rich.console import Console

from distckpt.format.json.lease import Lease

PIPED_COLUMNS = 1 << 20
"""Where no terminal shows it nothing is too long."""


def local_time(seconds: float) -> str:
    """A moment, given in epoch seconds, on the clock of this machine: ``2026-11-21 05:41:49``."""
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def duration(seconds: float) -> str:
    """About how long, in one unit: ``3 d``, ``45 s``, ``12 ms``."""
    units = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, length = next((one for one in units if seconds >= one[1]), ("ms", 0.001))
    amount = seconds / length
    return f"{amount:.1f} {unit}" if amount < 9.95 and unit != "d" else f"{amount:.0f} {unit}"


def pin_in_words(lease: Lease) -> str:
    """``pinned by alice@host since 2026-11-21 05:41:49: to be compared with``."""
    note = f": {lease.note}" if lease.note else ""
    return f"pinned by {lease.holder or 'somebody'} since {local_time(lease.since)}{note}"


def pin_as_json(lease: Lease | None) -> dict[str, Any] | None:
    """A pin for programs."""
    return None if lease is None else {"by": lease.holder, "since": lease.since, "note": lease.note}


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line how that ends: rich would exit with 1, which is for damage."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console() -> Console:
    """Where tables go: stdout, as wide as the terminal or COLUMNS says, or as they are. Colours only on a terminal."""
    columns = os.environ.get("COLUMNS", "")
    wide = None if sys.stdout.isatty() or columns.isdigit() else PIPED_COLUMNS
    return _Console(file=sys.stdout, width=wide, highlight=False, emoji=False, markup=False)


def print_bases(bases: Iterable[str], what: str) -> None:
    """Say of each base, but for '', once that frozen parameters come from there, and ``what`` the command does with it."""
    for base in sorted({*bases} - {""}):
        console().print(f"Frozen parameters come from {base}, which {what}", soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))
