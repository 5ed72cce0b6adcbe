from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distckpt.format import names
from distckpt.format.json.sealed import seal, unseal
from distckpt.format.json.stats import FORMAT, MAX_STATS_BYTES, MOST_RECENT, Durations, RunStats, SaveTook

KINDS: dict[str, Any] = {"int": 1, "float": 2.5, "str": "x", "End": "closed", "Durations": Durations(2, 3.0, 2.0)}
STATS = RunStats(**{name: KINDS[kind] for name, kind in RunStats.__annotations__.items() if kind in KINDS})
SAVE = SaveTook(1_000_000_000, 123456.789012345, 0.123456789012345, 12.3456789012345, None, 0.0)


def test_statistics_come_back_as_they_were_written() -> None:
    data = seal(STATS)
    assert unseal(data, RunStats, "_stats", MAX_STATS_BYTES) == STATS
    assert b'"stall":[2,3.0,2.0]' in data
    assert b"recent" not in data, "as it was before there were any"
    assert len(data) < 1500


def test_as_many_saves_as_are_kept_fit() -> None:
    saves = tuple(SAVE._replace(number=SAVE.number + at, last=0, lag=1.23456789012345) for at in range(MOST_RECENT))
    stats = msgspec.structs.replace(STATS, recent=saves)
    assert unseal(seal(stats), RunStats, "_stats", MAX_STATS_BYTES) == stats


@pytest.mark.parametrize(
    "nonsense",
    [
        {"format": FORMAT + 1},
        {"run": 0},
        {"world_size": 0},
        {"host": "h" * 257},
        {"saves": -1},
        {"bytes_written": 1 << 61},
        {"seconds": -1.0},
        {"stall": Durations(1, -1.0, 0.0)},
        {"stall": Durations(-1, 0.0, 0.0)},
        {"committed": Durations(1, 0.0, float("inf"))},
        {"began": float("inf")},
        {"began": -1e300},
        {"end": "somehow"},
        {"recent": (SAVE._replace(stall=-1.0),)},
        {"recent": (SAVE._replace(at=float("nan")),)},
        {"recent": (SAVE._replace(number=-1),)},
        {"recent": (SAVE._replace(last=1),)},
        {"recent": (SAVE._replace(last=-1),)},
        {"recent": (SAVE,) * (MOST_RECENT + 1)},
    ],
)
def test_what_makes_no_sense_is_not_written(nonsense: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="RunStats"):
        seal(msgspec.structs.replace(STATS, **nonsense))


def test_their_paths_say_which_run_they_are_of() -> None:
    path = names.stats_path(42, "0123456789abcdef" * 2)
    assert path == "_stats/000000000000000042-0123456789abcdef0123456789abcdef.json"
    assert names.stats_run(path) == 42
    assert names.stats_run("_stats/notes.txt") is None
