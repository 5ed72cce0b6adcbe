"""Sizes and numbers as people read them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(nbytes: int) -> str:
    """``1.3 GiB``: three or four digits, in powers of 1024."""
    power = 0
    amount = float(nbytes)
    while amount >= 1023.5 and power < len(_UNITS) - 1:
        amount, power = amount / 1024, power + 1
    digits = 1 if power and amount < 99.95 else 0
    return f"{amount:.{digits}f} {_UNITS[power]}"


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``3 shards``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
