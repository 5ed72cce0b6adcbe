"""What runs tell of themselves, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from distckpt.directory.log import read_tail
from distckpt.directory.stats import write_stats
from distckpt.format import names
from distckpt.format.json.stats import FORMAT, Durations, RunStats
from distckpt.storage import LocalStore

HOUR = 3600.0


def tell(directory: Path, number: int, **values: Any) -> None:
    """As the run with that number would: all that is not said is nothing."""
    store = LocalStore(directory)
    nothing = {name: Durations() for name in RunStats.__annotations__ if RunStats.__annotations__[name] == "Durations"}
    zeros: dict[str, Any] = {name: 0 for name, kind in RunStats.__annotations__.items() if kind == "int"}
    zeros |= {name: 0.0 for name, kind in RunStats.__annotations__.items() if kind == "float"}
    whole = {**zeros, **nothing, "format": FORMAT, "host": "node-1", "world_size": 8, "end": "", "run": number}
    whole |= {"origin": read_tail(store).state.origin, "began": 1.8e9 + number * 20 * HOUR, **values}
    record = msgspec.convert(whole, RunStats)
    write_stats(store, names.stats_path(number, f"{number:032x}"), record)
