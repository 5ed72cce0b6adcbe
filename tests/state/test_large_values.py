"""Large plain values: encoded again only when they have changed, and then always; a large dict is one value."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.state.collector import LARGE_TEXT, MOST_ITEMS, Collector
from distckpt.state.unchanged import snapshot_of
from tests.support.comparing import same

N = 20_000


class Box:
    """Something that changes without a sign."""


def _set(value: Any, at: Any, item: Any) -> None:
    value[at] = item


CHANGES: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (lambda: list(range(N)), lambda value: _set(value, N // 2, 7)),
    (lambda: list(range(N)), lambda value: value.append(1)),
    (lambda: list(range(N)), lambda value: _set(value, 0, False)),
    (lambda: list(range(N)), lambda value: _set(value, 0, 0.0)),
    (lambda: [[number] for number in range(N)], lambda value: value[N // 2].append(7)),
    (lambda: [[number] for number in range(N)], lambda value: _set(value, 3, (3,))),
    (lambda: [([number],) for number in range(N)], lambda value: _set(value[5][0], 0, 7)),
    (lambda: [(number, (number,)) for number in range(N)], lambda value: _set(value, 5, (5, [5]))),
    (lambda: [{"a": number} for number in range(N)], lambda value: _set(value[9], "a", 7)),
    (lambda: [{"a": number} for number in range(N)], lambda value: _set(value[9], "b", 7)),
    (lambda: {f"{number}": number for number in range(N)}, lambda value: _set(value, "5", 7)),
    (lambda: {f"{number}": number for number in range(N)}, lambda value: _set(value, "5", value.pop("5"))),
    (lambda: {number: [number] for number in range(N)}, lambda value: value[5].append(1)),
    (lambda: set(range(N)), lambda value: value.add(-1)),
    (lambda: deque(range(N)), lambda value: value.rotate(1)),
    (lambda: Counter(range(N)), lambda value: value.update([5])),
    (lambda: OrderedDict((number, number) for number in range(N)), lambda value: value.move_to_end(0)),
    (
        lambda: defaultdict(int, {number: number for number in range(N)}),
        lambda value: setattr(value, "default_factory", list),
    ),
    (lambda: [1, "x" * (2 * LARGE_TEXT), [2]], lambda value: value[2].append(3)),
    (lambda: [bytearray(LARGE_TEXT), 1], lambda value: _set(value[0], 5, 9)),
]


@pytest.mark.parametrize(("make", "change"), CHANGES[:-1])
def test_a_change_anywhere_is_seen(make: Callable[[], Any], change: Callable[[Any], object]) -> None:
    value = make()
    snapshot = snapshot_of(value)
    assert snapshot is not None
    change(value)
    assert not snapshot.is_of(value)


@pytest.mark.wide(5)
@pytest.mark.parametrize("wrap", [lambda value: value, distckpt.PerRank], ids=["plain", "per-rank"])
@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_a_large_value_that_changes_anywhere_is_saved_as_it_is_then(
    make: Callable[[], Any], change: Callable[[Any], object], wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    value = make()
    with distckpt.CheckpointManager(distckpt.Checkpoint(value=wrap(value)), tmp_path) as manager:
        for number in (1, 2):
            manager.save(number)
        change(value)
        found = distckpt.load(manager.save(3).result(30), "value")
    found = found if wrap is not distckpt.PerRank else found[0]
    assert type(found) is type(value)
    assert same(found, value) or repr(found) == repr(value)
    assert list(found) == list(value)


@pytest.mark.parametrize("make", [make for make, _ in CHANGES[:-1]])
def test_what_has_not_changed_is_seen_without_encoding_it(make: Callable[[], Any]) -> None:
    value = make()
    snapshot = snapshot_of(value)
    assert snapshot is not None
    assert snapshot.is_of(value)
    assert not snapshot.is_of(make())


@pytest.mark.parametrize("value", [[Box()], [bytearray(3)], [torch.ones(2)], {"a": (Box(),)}])
def test_of_what_may_change_without_a_sign_nothing_is_remembered(value: Any) -> None:
    assert snapshot_of(value) is None


# ---- large dicts -----------------------------------------------------------------------------------------------------------


def words(count: int) -> dict[str, Any]:
    return {f"w{number}": number for number in range(count)}


def test_a_large_dict_of_plain_values_is_one_value(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "small": words(MOST_ITEMS),
        "large": words(MOST_ITEMS + 1),
        "nested": {"x": {number: (number,) for number in range(2 * MOST_ITEMS)}},
        "mixed": {**words(MOST_ITEMS), "deep": [{"tensor": torch.ones(1)}]},
    }
    with distckpt.CheckpointManager(distckpt.Checkpoint(own=own), tmp_path) as manager:
        path = manager.save(1).result(30)
    with distckpt.open(path) as reader:
        keys = set(reader.keys())
        assert {"own.small.w5", "own.large", "own.nested.x", "own.mixed.w5", "own.mixed.deep.0.tensor"} <= keys
        assert len(keys) == 2 * MOST_ITEMS + 4
        assert same(reader.load("own"), own)
    live: dict[str, Any] = {name: {} for name in own}
    distckpt.Checkpoint(own=live).restore(path, partial=True)
    assert same(live, own)
    held = live["large"]
    held["w5"] = held["more"] = -1
    distckpt.Checkpoint(own=live).restore(path).assert_consumed()
    assert live["large"] is held
    assert held == own["large"]


def test_ranks_may_have_other_items_of_one_large_dict_so_it_is_entered_where_there_are_others() -> None:
    large = words(MOST_ITEMS + 1)
    checkpoint = distckpt.Checkpoint(shared=large, own=distckpt.PerRank(large))
    for world_size, shared in ((1, 1), (2, MOST_ITEMS + 1)):
        keys = [row.key for row in Collector(checkpoint, 0, world_size).collect().rows]
        assert sum(key.startswith("shared") for key in keys) == shared
        assert "own@0" in keys
