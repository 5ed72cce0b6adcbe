"""Plain values: what can be stored comes back exactly, everything else is refused by name, and reading runs no code."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import struct
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.values import UnresolvedEnum, capacity_for, decode_value, encode_value, pad_value
from tests.support.comparing import same


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


class Outer:
    class Inner(enum.Enum):
        A = "a"


Point = namedtuple("Point", "x y")  # noqa: PYI024


@dataclass(frozen=True)
class Settings:
    lr: float


text = st.text(st.characters(exclude_categories=["Cs"]))
numpy_scalars = st.one_of(
    st.integers(-128, 127).map(np.int8),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.booleans().map(np.bool_),
    st.floats(width=16).map(np.float16),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.complex_numbers().map(np.complex128),
    st.complex_numbers(width=64).map(np.complex64),
    text.map(np.str_),
    st.binary().map(np.bytes_),
    st.integers(-(2**62), 2**62).map(lambda ticks: np.datetime64(ticks, "ns")),
    st.integers(-(2**62), 2**62).map(lambda ticks: np.timedelta64(ticks, "25s")),
)
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**300), 2**300),
    st.floats(),
    st.complex_numbers(),
    text,
    text.map(lambda end: "$" + end),
    st.binary(),
    st.sampled_from([*Color, *Level, *Word, *Right, Outer.Inner.A]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cuda:3"), torch.device("cpu"), torch.Size([2, 0])]),
    st.sampled_from([torch.Size([]), np.dtype("float32"), np.dtype(">i2"), np.dtype("U7"), np.dtype("M8[us]")]),
    numpy_scalars,
)
hashables = st.recursive(
    atoms,
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=6,
)
values = st.recursive(
    hashables,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(text, inner, max_size=5),
        st.dictionaries(hashables, inner, max_size=5),
        st.sets(hashables, max_size=5),
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(values, st.integers(0, 40))
def test_every_value_comes_back_exactly_whatever_the_padding(value, blanks):
    data = encode_value(value, "key")
    json.loads(data)  # it is plain JSON
    assert same(decode_value(data + b" " * blanks, "shard", "key"), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        float("nan"),
        struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],
        float("inf"),
        5e-324,
        1e16,
        2**63,
        -(2**63) - 1,
        [-(10**5000)],
        True,
        1,
        1.0,
        [1, (2, [3, (4,)])],
        {"$tuple": [1]},
        {"$dict": {}, "b": 1},
        {"$": None},
        {1: "int", "1": "str", None: 2, (1, "a"): 3, b"x": 4, 2.5: 5},
        {"b": 1, "a": 2},
        {(): {frozenset({1, (2,)})}},
        [],
        (),
        {},
        set(),
        b"",
        "",
        "\u2028\0\U0001f600",
        np.datetime64("NaT", "s"),
    ],
)
def test_awkward_values_come_back(value):
    assert same(decode_value(encode_value(value, "key"), "shard", "key"), value)


def test_the_text_of_a_set_does_not_depend_on_the_process():
    script = (
        "from distckpt.format.tree.values import encode_value;"
        "print(encode_value({'names': {str(i) for i in range(99)}}, 'k').decode())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_values_that_are_not_torchs_need_no_torch():
    script = (
        "import sys; from distckpt.format.tree.values import *; from distckpt.format.tree.tree import *;"
        "decode_value(encode_value({1: (2.5, b'x')}, 'k'), 'p', 'k'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: 0, "function"),
        (math, "module"),
        (object(), "object"),
        (np.float32, "type"),
        (torch.ones(1), "Tensor"),
        (np.ones(1), "ndarray"),
        (np.dtype([("a", "i4")]), "dtype"),
        (np.void(b"ab"), "void"),
        (torch.strided, "layout"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_key_type_and_advice(value, kind):
    with pytest.raises(EncodeError, match="store") as caught:
        encode_value({"a": [0, value]}, "optimizer.extra")
    assert caught.value.key == "optimizer.extra"
    assert kind in str(caught.value)
    assert "['a'][1]" in str(caught.value)


def test_half_a_surrogate_pair_is_refused():
    for value in ("\ud800", {"\udfff": 1}, {"\ud800"}):
        with pytest.raises(EncodeError, match="surrogate"):
            encode_value(value, "key")


def test_combined_flags_and_hidden_enums_are_refused():
    class Local(enum.Enum):
        A = 1

    with pytest.raises(EncodeError, match="combination"):
        encode_value(Right.READ | Right.WRITE, "key")
    with pytest.raises(EncodeError, match="Local"):
        encode_value(Local.A, "key")


def test_a_hundred_levels_are_stored_and_no_more():
    value: object = 1
    for _ in range(100):
        value = (value,)
    assert same(decode_value(encode_value(value, "key"), "shard", "key"), value)
    with pytest.raises(EncodeError, match="100 levels"):
        encode_value([value], "key")


def test_a_value_that_holds_itself_is_refused():
    loop: list[object] = []
    loop.append({"again": loop})
    with pytest.raises(EncodeError, match="holds itself"):
        encode_value(loop, "key")


def test_an_enum_of_a_module_that_is_not_imported_stays_unresolved_and_imports_nothing():
    data = b'{"$enum":["this","Nothing","A",[1]]}'
    assert "this" not in sys.modules
    value = decode_value(data, "shard", "key")
    assert value == UnresolvedEnum("this:Nothing", "A", [1])
    assert "this" not in sys.modules
    assert encode_value(value, "key") == data


@pytest.mark.parametrize("name", ["Gone", "Color.RED", "Settings", "Point", "os.path", "np.int64", "Color.GONE", ""])
def test_an_enum_is_only_ever_an_enum_class(name):
    data = json.dumps({"$enum": [__name__, name, "RED", 1]}).encode()
    assert decode_value(data, "shard", "key") == UnresolvedEnum(f"{__name__}:{name}", "RED", 1)


def test_a_member_that_is_gone_stays_unresolved():
    data = json.dumps({"$enum": [__name__, "Color", "BLUE", 9]}).encode()
    assert decode_value(data, "shard", "key") == UnresolvedEnum(f"{__name__}:Color", "BLUE", 9)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"   ",
        b"{",
        b"1 2",
        b"1\x00",
        b"NaN",
        b"1e999",
        b'"\xff"',
        b'{"$tuple":1}',
        b'{"$tuple":[1],"a":2}',
        b'{"a":2,"$tuple":[1]}',
        b'{"$object":["os","system"]}',
        b'{"$int":"12"',
        b'{"$int":"0"}',
        b'{"$int":"0x12"}',
        b'{"$int":12}',
        b'{"$float":"3ff0000000000000"}',
        b'{"$float":"7ff 000000000000"}',
        b'{"$float":"nan"}',
        b'{"$complex":[1,2.0]}',
        b'{"$complex":[1.0]}',
        b'{"$bytes":"a"}',
        b'{"$bytes":"a\\n=="}',
        b'{"$set":[[1]]}',
        b'{"$set":[1,1.0]}',
        b'{"$dict":[["a"]]}',
        b'{"$dict":[["a",1],["a",2]]}',
        b'{"$dict":[[[],1]]}',
        b'{"$dict":{"a":1}}',
        b'{"$enum":["a","b","c"]}',
        b'{"$enum":["a","b",1,1]}',
        b'{"$numpy":["O","AAAAAAAAAAA="]}',
        b'{"$numpy":["<f4","AAA="]}',
        b'{"$numpy":["<M8[7zz]","AAAAAAAAAAA="]}',
        b'{"$numpy.dtype":"O"}',
        b'{"$numpy.dtype":"i4,i4"}',
        b'{"$torch.Size":[1.5]}',
        b'{"$torch.Size":[true]}',
        b'{"$torch.dtype":"float33"}',
        b'{"$torch.dtype":"nn"}',
        b'{"$torch.device":"toaster:1"}',
        b"[" * 101 + b"1" + b"]" * 101,
        b"[" * 100_000,
        b'{"$tuple":[' * 101 + b"1" + b"]}" * 101,
    ],
)
def test_anything_else_is_damage_named_with_path_and_key(data):
    with pytest.raises(DamagedError) as caught:
        decode_value(data, "ckpt-7/00003-0.arrow", "model.x")
    assert caught.value.path == "ckpt-7/00003-0.arrow"
    assert caught.value.key == "model.x"


@settings(deadline=None)
@given(st.binary())
def test_arbitrary_bytes_are_decoded_or_damaged(data):
    with contextlib.suppress(DamagedError):
        decode_value(data, "shard", "key")


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 600))
def test_padding_adds_blanks_or_says_that_it_cannot(data, capacity):
    if capacity < len(data):
        with pytest.raises(ValueError, match="do not fit"):
            pad_value(data, capacity)
    else:
        padded = pad_value(data, capacity)
        assert len(padded) == capacity
        assert padded[: len(data)] == data
        assert not padded[len(data) :].strip(b" ")


def test_a_slot_is_a_power_of_two_from_64_bytes_on():
    sizes = [0, 1, 63, 64, 65, 128, 129, 1 << 20, (1 << 20) + 1]
    assert [capacity_for(size) for size in sizes] == [64, 64, 64, 64, 128, 128, 256, 1 << 20, 1 << 21]
