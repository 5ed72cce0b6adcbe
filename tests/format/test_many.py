"""Many values that are alike are written together: the bytes are those that each has by itself."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import EncodeError
from distckpt.format.tree.many import hold_nothing
from distckpt.format.tree.values import MAX_DEPTH, decode_value, encode_value
from tests.support.comparing import same

ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=3), st.binary(max_size=3)
)
NAMES = st.text(max_size=3) | st.sampled_from(["$tuple", "$dict", "a"])


def alike(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Containers of such items, and items that are alike side by side."""
    return st.one_of(
        st.lists(items, max_size=4),
        st.lists(items, max_size=4).map(tuple),
        st.dictionaries(NAMES, items, max_size=4),
        st.dictionaries(st.integers(0, 9), items, max_size=4),
        st.lists(st.lists(items, max_size=3).map(tuple), max_size=4),
        st.lists(st.dictionaries(NAMES, items, max_size=3), max_size=4),
    )


def one_by_one(value: Any) -> Any:
    """As the format says it, without a look at more than one at a time."""
    match value:
        case list():
            return list(map(one_by_one, value))
        case tuple():
            return {"$tuple": list(map(one_by_one, value))}
        case dict():
            if all(type(name) is str and not name.startswith("$") for name in value):
                return {name: one_by_one(item) for name, item in value.items()}
            return {"$dict": [[one_by_one(name), one_by_one(item)] for name, item in value.items()]}
    return msgspec.json.decode(encode_value(value, ""))


@given(st.recursive(ATOMS, alike, max_leaves=20))
def test_values_that_are_alike_have_the_bytes_that_each_has_by_itself(value: Any) -> None:
    data = encode_value(value, "key")
    assert data == msgspec.json.encode(one_by_one(value))
    assert same(decode_value(data, "path", "key"), value)


@pytest.mark.parametrize(
    "value",
    [
        [(number, float(number)) for number in range(2000)],
        [(number, (number, [number, None])) for number in range(2000)],
        [{"a": number, "b": [number]} for number in range(2000)],
        {number: (number,) for number in range(2000)},
        OrderedDict((f"{number}", number) for number in range(2000, 0, -1)),
        Counter(range(2000)),
        defaultdict(list, {number: [number] for number in range(2000)}),
        deque([(number,) for number in range(2000)], 5000),
        {(number, f"{number}") for number in range(2000)},
        [math.inf, 1 << 64, b"x", 1 + 2j] * 500,
    ],
    ids=lambda value: type(value).__name__,
)
def test_large_containers_come_back_as_they_were(value: Any) -> None:
    found = decode_value(encode_value(value, "key"), "path", "key")
    assert type(found) is type(value)
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, set)


def test_what_is_refused_among_many_is_named() -> None:
    rows = [(number, {"x": [number]}) for number in range(1000)]
    rows[700][1]["x"].append(object())  # type: ignore[arg-type]
    with pytest.raises(EncodeError, match=r"\[700\]\[1\]\['x'\]\[1\] is of type object"):
        encode_value(rows, "key")
    with pytest.raises(EncodeError, match=r"\[3\]\['half'\].*surrogate|surrogate"):
        encode_value([{"half": "x"}, {"half": "\ud800"}], "key")


def test_what_holds_itself_is_refused_however_wide_it_is() -> None:
    wide: list[Any] = []
    wide.extend([wide] * 1000)
    turns: list[Any] = [[], []]
    for each in turns:
        each.extend(turns)
    for value in (wide, turns, [(wide,)] * 20):
        assert not hold_nothing(value, MAX_DEPTH)
        with pytest.raises(EncodeError, match=r"nested deeper|holds itself"):
            encode_value(value, "key")


def test_depth_is_counted_as_it_was() -> None:
    deepest: Any = 1
    for _ in range(MAX_DEPTH):
        deepest = [deepest]
    assert decode_value(encode_value(deepest, "key"), "path", "key") == deepest
    with pytest.raises(EncodeError, match="nested deeper"):
        encode_value([deepest], "key")
    assert hold_nothing([deepest], MAX_DEPTH)
