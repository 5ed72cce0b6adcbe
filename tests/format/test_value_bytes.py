"""The bytes of values that format version 1 could write from its beginning; a new tag must not change one of them."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch

from distckpt.errors import EncodeError
from distckpt.format.tree.values import decode_value, encode_value


class Color(enum.Enum):
    RED = 1
    DARK = ("a", 2.5)


class Level(enum.IntEnum):
    LOW = 1


class Word(str, enum.Enum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


WRITTEN: list[tuple[object, bytes]] = [
    (None, b"null"),
    (True, b"true"),
    ([0, 1, -1, 2**63 - 1, -(2**63)], b"[0,1,-1,9223372036854775807,-9223372036854775808]"),
    (
        [2**63, -(2**63) - 1, 2**64, 1],
        b'[{"$int":"8000000000000000"},{"$int":"-8000000000000001"},{"$int":"10000000000000000"},1]',
    ),
    ([0.1, -0.0, 1e16, 5e-324, 1.0], b"[0.1,-0.0,1e16,5e-324,1.0]"),
    (
        [float("inf"), float("-inf"), float("nan"), 1.0],
        b'[{"$float":"7ff0000000000000"},{"$float":"fff0000000000000"},{"$float":"7ff8000000000000"},1.0]',
    ),
    ([1, 2.5, True, None, "x", 2**70], b'[1,2.5,true,null,"x",{"$int":"400000000000000000"}]'),
    (1 + 2j, b'{"$complex":[1.0,2.0]}'),
    (complex(float("nan"), 0.0), b'{"$complex":[{"$float":"7ff8000000000000"},0.0]}'),
    (b"abc", b'{"$bytes":"YWJj"}'),
    ('\u2028\0\U0001f600"', b'"\xe2\x80\xa8\\u0000\xf0\x9f\x98\x80\\""'),
    ((), b'{"$tuple":[]}'),
    ([], b"[]"),
    ({}, b"{}"),
    (set(), b'{"$set":[]}'),
    (frozenset({1, (2,)}), b'{"$frozenset":[1,{"$tuple":[2]}]}'),
    ({"b", "a", "$c"}, b'{"$set":["$c","a","b"]}'),
    ([[1, 2], [3, 2**63], []], b'[[1,2],[3,{"$int":"8000000000000000"}],[]]'),
    ([[1, 2], [3.5, "x"]], b'[[1,2],[3.5,"x"]]'),
    ((1, (2, [3, (4,)])), b'{"$tuple":[1,{"$tuple":[2,[3,{"$tuple":[4]}]]}]}'),
    ({"b": 1, "a": {"c": [1, 2.5]}}, b'{"b":1,"a":{"c":[1,2.5]}}'),
    ({"a": float("inf"), "b": 2**63}, b'{"a":{"$float":"7ff0000000000000"},"b":{"$int":"8000000000000000"}}'),
    ({"$tuple": [1]}, b'{"$dict":[["$tuple",[1]]]}'),
    ({"$": None}, b'{"$dict":[["$",null]]}'),
    (
        {1: "int", "1": "str", None: 2, (1, "a"): 3, b"x": 4, 2.5: 5, True + 1: 6},
        b'{"$dict":[[1,"int"],["1","str"],[null,2],[{"$tuple":[1,"a"]},3],[{"$bytes":"eA=="},4],[2.5,5],[2,6]]}',
    ),
    ({1: 2, 3: 4}, b'{"$dict":[[1,2],[3,4]]}'),
    ({1: (2,)}, b'{"$dict":[[1,{"$tuple":[2]}]]}'),
    ({float("nan"): 1}, b'{"$dict":[[{"$float":"7ff8000000000000"},1]]}'),
    (Color.DARK, b'{"$enum":["tests.format.test_value_bytes","Color","DARK",{"$tuple":["a",2.5]}]}'),
    (
        [Level.LOW, Word.YES, Right.WRITE],
        b'[{"$enum":["tests.format.test_value_bytes","Level","LOW",1]},{"$enum":["tests.format.test_value_bytes","Word","YES","yes"]},{"$enum":["tests.format.test_value_bytes","Right","WRITE",2]}]',
    ),
    (np.float32(0.5), b'{"$numpy":["<f4","AAAAPw=="]}'),
    (np.str_("s"), b'{"$numpy":["str","s"]}'),
    (np.bytes_(b"s"), b'{"$numpy":["bytes","cw=="]}'),
    (np.datetime64(7, "ns"), b'{"$numpy":["<M8[ns]","BwAAAAAAAAA="]}'),
    (np.dtype(">i2"), b'{"$numpy.dtype":">i2"}'),
    (torch.Size([2, 0]), b'{"$torch.Size":[2,0]}'),
    (torch.bfloat16, b'{"$torch.dtype":"bfloat16"}'),
    (torch.device("cuda:0"), b'{"$torch.device":"cuda:0"}'),
    (
        {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-08, "foreach": None, "params": [0, 1]},
        b'{"lr":0.001,"betas":{"$tuple":[0.9,0.999]},"eps":1e-8,"foreach":null,"params":[0,1]}',
    ),
]


@pytest.mark.parametrize(("value", "data"), WRITTEN)
def test_what_could_be_written_from_the_beginning_has_the_same_bytes(value, data):
    assert encode_value(value, "key") == data
    assert encode_value(decode_value(data, "shard", "key"), "key") == data


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        [1.5, 2.5],
        ["a", None, True, 1, 2.0],
        [[1, 2], [3.5], []],
        {"a": 1, "b": 2.5},
        {1: "a", 2: "b"},
        (1, 2.0, None),
    ],
)
@pytest.mark.parametrize("more", [2**63, -(2**63) - 1, float("nan"), float("-inf"), (1,), b"x", "$", {"$x": 1}, [[1]]])
def test_plain_content_has_the_same_bytes_alone_and_beside_what_needs_a_form(value, more):
    """Content that msgspec writes as it is must not be taken for such when one item is not."""
    alone, beside = encode_value(value, "key"), encode_value([value, more, value], "key")
    assert beside == b"[" + alone + b"," + encode_value(more, "key") + b"," + alone + b"]"
    items = [*value.values()] if isinstance(value, dict) else [*value]
    inside = b",".join(encode_value(item, "key") for item in [*items, more])
    assert encode_value([*items, more], "key") == b"[" + inside + b"]"


def test_the_deepest_level_is_counted_for_plain_content_too():
    value: list[object] = [1, 2]
    for _ in range(99):
        value = [value, 3]
    assert decode_value(encode_value(value, "key"), "shard", "key") == value
    for deeper in ([value], [value, value], (value,), {"a": value}):
        with pytest.raises(EncodeError, match="100 levels"):
            encode_value(deeper, "key")


def test_rows_that_hold_their_list_are_refused():
    rows: list[object] = []
    rows += [rows, rows]
    with pytest.raises(EncodeError, match="holds itself"):
        encode_value(rows, "key")
