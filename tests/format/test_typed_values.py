"""Values with a typed form come back as the type that they were, run no code on the way, and are refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import types
import typing
import zoneinfo
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.values import Unresolved, decode_value, encode_value, is_tensor_array

RAN: list[str] = []
"""What code of the classes below has run."""

Point = namedtuple("Point", "x y")  # noqa: PYI024


class Pair(typing.NamedTuple):
    left: Any
    right: Any = None


@dataclass
class Settings:
    lr: Any
    name: Any = "adam"
    kind: ClassVar[str] = "no field"


@dataclass(frozen=True)
class Frozen:
    one: Any
    two: Any = None


@dataclass(slots=True, order=True)
class Slotted:
    one: Any
    two: Any = field(default=2, init=False)


@dataclass
class Loud:
    """Its own code would say that it ran."""

    value: Any

    def __post_init__(self) -> None:
        RAN.append("__post_init__")

    def __setattr__(self, name: str, value: Any) -> None:
        RAN.append("__setattr__")
        object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        RAN.append("__getattribute__")
        return object.__getattribute__(self, name)


class Name(str):
    __slots__ = ()


class LoudName(str):
    __slots__ = ()

    def __new__(cls, *args: object) -> LoudName:
        RAN.append("__new__")
        return str.__new__(cls, *args)

    def __str__(self) -> str:
        RAN.append("__str__")
        return "other"

    def __hash__(self) -> int:
        RAN.append("__hash__")
        return 1

    def __eq__(self, other: object) -> bool:
        RAN.append("__eq__")
        return True


class Count(int):
    pass


class Rate(float):
    pass


class Raw(bytes):
    pass


class Row(tuple):
    __slots__ = ()


class Items(list):
    def append(self, item: object) -> None:
        RAN.append("append")


class Config(dict):
    def __setitem__(self, key: object, value: object) -> None:
        RAN.append("__setitem__")

    def items(self) -> Any:
        RAN.append("items")
        return ()


def back(value: Any) -> Any:
    """What comes back of the value; its bytes are the same when it is saved again."""
    data = encode_value(value, "key")
    json.loads(data)
    found = decode_value(data + b"  ", "shard", "key")
    assert encode_value(found, "key") == data
    return found


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, item.name), getattr(other, item.name)) for item in dataclasses.fields(one))
    if isinstance(one, dict):
        pairs = zip(dict.items(one), dict.items(other), strict=True)
        more = ("default_factory",) if isinstance(one, defaultdict) else ()
        return all(same(a, b) for a, b in pairs) and all(getattr(one, m) is getattr(other, m) for m in more)
    if isinstance(one, list | tuple | deque):
        limits = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return limits and len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, slice):
        return all(same(getattr(one, part), getattr(other, part)) for part in ("start", "stop", "step"))
    return repr(one) == repr(other)


zones = st.one_of(
    st.none(),
    st.just(timezone.utc),
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
    st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)), st.text("ab€", max_size=3)),
)
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
atoms = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    plain_text,
    st.none(),
    st.dates(),
    st.builds(lambda at, zone, fold: at.replace(tzinfo=zone, fold=fold), st.datetimes(), zones, st.integers(0, 1)),
    st.builds(lambda at, zone, fold: at.replace(tzinfo=zone, fold=fold), st.times(), zones, st.integers(0, 1)),
    st.timedeltas(),
    zones,
    st.decimals(),
    st.fractions(),
    st.builds(range, st.integers(-(2**70), 2**70), st.integers(), st.integers(1, 9)),
    st.text("ab/.", max_size=6).map(pathlib.Path),
    st.text("ab/.\\:", max_size=6).map(pathlib.PureWindowsPath),
    st.text("ab/.", max_size=6).map(pathlib.PurePosixPath),
    plain_text.map(Name),
    st.integers(-(2**70), 2**70).map(Count),
    st.floats().map(Rate),
    st.binary(max_size=5).map(Raw),
)
hashables = st.recursive(
    atoms.filter(lambda value: not (isinstance(value, Decimal) and value.is_snan())),
    lambda inner: st.one_of(
        st.builds(Point, inner, inner), st.builds(Pair, inner, inner), st.builds(Frozen, inner, inner),
        st.lists(inner, max_size=3).map(Row),
    ),
    max_leaves=4,
)  # fmt: skip
pairs = st.dictionaries(hashables, atoms, max_size=3)
values = st.recursive(
    st.one_of(atoms, st.binary(max_size=5).map(bytearray), st.builds(slice, atoms, atoms, atoms)),
    lambda inner: st.one_of(
        hashables,
        st.builds(Point, inner, inner),
        st.builds(Settings, inner, inner),
        st.builds(Frozen, inner, inner),
        st.builds(Slotted, inner),
        st.lists(inner, max_size=3).map(Items),
        st.lists(inner, max_size=3).map(Row),
        st.lists(inner, max_size=3).map(deque),
        st.lists(inner, max_size=3).map(lambda items: deque(items, 3)),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, inner, max_size=3).map(Counter),
        st.dictionaries(hashables, inner, max_size=3).map(Config),
        st.builds(
            defaultdict, st.sampled_from([None, list, dict, int, float, set, str, deque, OrderedDict]),
            st.dictionaries(hashables, inner, max_size=3),
        ),
        st.dictionaries(plain_text, inner, max_size=3),
        st.lists(inner, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(values)
def test_every_value_comes_back_as_the_type_that_it_was(value):
    assert same(back(value), value)


dtypes = st.recursive(
    st.sampled_from([">i2", ">u8", ">f2", ">f4", ">f8", ">c8", ">c16", "<M8[D]", ">M8[25ns]", "<m8[us]", "<U3", ">U2", "S4", "V5",
                     "<i4", "<f8", "?"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: [(f"f{at}", part) for at, part in enumerate(parts)]),
        st.tuples(inner, st.tuples(st.integers(1, 3), st.integers(1, 2))),
    ),
    max_leaves=4,
).map(np.dtype)  # fmt: skip
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(deadline=None)
@given(dtypes, shapes, st.sampled_from("CF"), st.randoms(use_true_random=False))
def test_arrays_that_torch_has_no_dtype_for_come_back_to_the_last_bit(dtype, shape, order, noise):
    blank = np.zeros(shape, dtype)
    raw = bytearray(noise.getrandbits(8) for _ in range(blank.nbytes))
    array = np.ndarray(blank.shape, blank.dtype, raw, order=order)
    if is_tensor_array(array):
        return
    found = back(array)
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes("A") == array.tobytes("A")
    assert found.flags.f_contiguous == array.flags.f_contiguous
    assert found.flags.writeable


def test_what_lies_between_the_fields_of_a_structured_array_is_not_written():
    dtype = np.dtype([("a", "i1"), ("b", "<f8"), ("c", [("x", ">i2", (2,))])], align=True)
    one, other = (np.frombuffer(byte * dtype.itemsize * 3, dtype).copy() for byte in (b"\0", b"\xff"))
    for name in ("a", "b", "c"):
        other[name] = one[name]
    assert encode_value(one, "key") == encode_value(other, "key")
    assert back(one).dtype == dtype
    assert back(one).dtype.isalignedstruct


def test_which_arrays_are_stored_as_tensors():
    assert is_tensor_array(np.ones(2))
    assert is_tensor_array(np.ones(2, np.uint16))
    assert is_tensor_array(np.ones((), np.complex64))
    for other in (np.ones(2, ">f4"), np.ones(2, np.longdouble), np.array([None]), np.ma.ones(2), [1], None, 1.0):
        assert not is_tensor_array(other)


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_numpy_generators_go_on_as_they_would_have(name):
    generator = np.random.Generator(getattr(np.random, name)([3, 2**100]))
    generator.integers(0, 9, dtype=np.int32)
    generator.spawn(2)
    found = back(generator)
    assert (found.random(9) == generator.random(9)).all()
    assert (found.spawn(1)[0].random(9) == generator.spawn(1)[0].random(9)).all()
    bits = getattr(np.random, name)(7)
    assert type(back(bits)) is type(bits)
    assert (back(bits).random_raw(9) == bits.random_raw(9)).all()
    legacy = np.random.RandomState(getattr(np.random, name)(7))
    legacy.randn()
    assert (back(legacy).randn(9) == legacy.randn(9)).all()


def test_other_generators_go_on_as_they_would_have():
    legacy = np.random.RandomState(5)
    legacy.randn()
    assert (back(legacy).randn(9) == legacy.randn(9)).all()
    python = random.Random(5)
    python.gauss(0, 1)
    found = back(python)
    assert [found.gauss(0, 1) for _ in range(9)] == [python.gauss(0, 1) for _ in range(9)]
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    found = back(generator)
    assert torch.equal(torch.randn(40, generator=found), torch.randn(40, generator=generator))


def test_a_generator_of_a_device_that_is_not_here_stays_as_it_is():
    data = encode_value(torch.Generator(), "key").replace(b'"cpu"', b'"cuda:77"')
    found = decode_value(data, "shard", "key")
    assert isinstance(found, Unresolved)
    assert (found.kind, found.type_name) == ("torch.Generator", "cuda:77")
    assert encode_value(found, "key") == data


def test_none_of_the_code_of_a_class_runs():
    value = [Loud(1), LoudName("a"), Items([1]), Config(a=1)]
    RAN.clear()
    data = encode_value(value, "key")
    found = decode_value(data, "shard", "key")
    assert RAN == []
    assert [type(item) for item in found] == [Loud, LoudName, Items, Config]
    assert str.__str__(found[1]) == "a"
    assert dict(dict.items(found[3])) == {"a": 1}


def test_a_class_with_a_hash_of_its_own_is_no_key():
    for value in ({LoudName("a"): 1}, {(1, LoudName("a"))}, OrderedDict({LoudName("a"): 1})):
        with pytest.raises(EncodeError, match=r"__hash__ of its own|__eq__ of its own"):
            encode_value(value, "key")
    RAN.clear()
    name = f'{{"$subclass":["{__name__}","LoudName","a"]}}'
    for data in (f'{{"$dict":[[{name},1]]}}', f'{{"$set":[{{"$tuple":[{name}]}}]}}', f'{{"$Counter":[[{name},1]]}}'):
        with pytest.raises(DamagedError):
            decode_value(data.encode(), "shard", "key")
    assert RAN == []


def test_a_class_that_is_not_imported_or_has_changed_is_described_and_saved_again():
    for data in (
        b'{"$dataclass":["this","Nothing",{"a":1,"b":{"$tuple":[2]}}]}',
        b'{"$namedtuple":["this","Nothing",{"a":1}]}',
        b'{"$subclass":["this","Nothing",{"$tuple":[1,2]}]}',
        b'{"$subclass":["this","Nothing","text"]}',
        json.dumps({"$dataclass": [__name__, "Settings", {"lr": 1}]}, separators=(",", ":")).encode(),
        json.dumps({"$dataclass": [__name__, "Settings", {"lr": 1, "kind": 2}]}, separators=(",", ":")).encode(),
        json.dumps({"$dataclass": [__name__, "Point", {"x": 1, "y": 2}]}, separators=(",", ":")).encode(),
        json.dumps({"$namedtuple": [__name__, "Point", {"x": 1, "z": 2}]}, separators=(",", ":")).encode(),
        json.dumps({"$namedtuple": [__name__, "Row", {"x": 1}]}, separators=(",", ":")).encode(),
        json.dumps({"$subclass": [__name__, "Name", 1]}, separators=(",", ":")).encode(),
        json.dumps({"$subclass": [__name__, "Settings", "a"]}, separators=(",", ":")).encode(),
        json.dumps({"$subclass": [__name__, "WithDel", "a"]}, separators=(",", ":")).encode(),
        json.dumps({"$subclass": [__name__, "json.JSONDecoder", "a"]}, separators=(",", ":")).encode(),
        b'{"$subclass":["builtins","bool",1]}',
        b'{"$subclass":["builtins","str","a"]}',
        b'{"$dataclass":["builtins","open",{"file":"a"}]}',
        b'{"$dataclass":["subprocess","Popen",{"args":"a"}]}',
    ):
        assert "this" not in sys.modules
        found = decode_value(data, "shard", "key")
        assert isinstance(found, Unresolved), found
        assert encode_value(found, "key") == data
        assert "this" not in sys.modules
    described = decode_value(b'{"$dict":[[{"$namedtuple":["this","Nothing",{"a":1}]},2]]}', "shard", "key")
    assert described == {Unresolved("namedtuple", "this:Nothing", (("a", 1),)): 2}


class WithDel(str):
    __slots__ = ()

    def __del__(self) -> None:
        RAN.append("__del__")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        RAN.append(name)
        return type.__getattribute__(cls, name)


@dataclass
class OfMeta(metaclass=Meta):
    value: Any = None


@dataclass
class Computed:
    value: Any

    @property  # type: ignore[no-redef]
    def value(self) -> Any:
        RAN.append("get")
        return 1

    @value.setter
    def value(self, value: Any) -> None:
        RAN.append("set")


@dataclass
class Stateful:
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


@dataclass
class Failure(Exception):
    text: str


class WithMore(str):  # noqa: SLOT000  it is to have a dict
    pass


class WithSlot(dict):
    __slots__ = ("more",)


def with_attribute(value: Any) -> Any:
    value.more = 1
    return value


def local() -> Any:
    @dataclass
    class Local:
        value: int = 1

    return Local()


def test_what_a_file_names_runs_no_code_even_if_it_is_imported():
    RAN.clear()
    for name, fields in (("OfMeta", {"value": 1}), ("Computed", {"value": 1}), ("Loud", {"value": 1})):
        data = json.dumps({"$dataclass": [__name__, name, fields]}).encode()
        found = decode_value(data, "shard", "key")
        assert type(found) is (Loud if name == "Loud" else Unresolved)
    data = json.dumps({"$subclass": [__name__, "WithDel", "a"]}).encode()
    assert type(decode_value(data, "shard", "key")) is Unresolved
    assert RAN == []


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (local(), "made inside a function"),
        (with_attribute(WithMore("a")), "more"),
        (with_attribute(WithSlot(a=1)), "more"),
        (with_attribute(Settings(1)), "more"),
        (with_attribute(OrderedDict(a=1)), "attributes"),
        (WithDel("a"), "__del__"),
        (OfMeta(1), "metaclass"),
        (Stateful(), "state_dict"),
        (Failure("a"), "no bare instance"),
        (object.__new__(Slotted), "has no value"),
        (defaultdict(lambda: 0), "factory is code"),
        (datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "time zone"),
        (np.array([None, "a"]), "tolist"),
        (np.ones(1, np.longdouble), "astype"),
        (np.ma.masked_array([1.0], [True]), "mask"),
        (np.ones((1, 1)).view(np.recarray), "asarray"),
        (np.zeros((16 << 20) // 4 + 1, ">f4"), "16777216 bytes"),
        (np.void(b"a"), "void"),
        (Settings, "type"),
        (types.SimpleNamespace(a=1), "SimpleNamespace"),
        (UserDict(a=1), "UserDict"),
        (os.stat("/"), "stat_result"),
        (torch.max(torch.ones(1, 1), 0), "return_types"),
        (np.ones(2), "Tensors and arrays"),
        (bytearray, "type"),
        (enum.Enum, "Enum"),
        ("\ud800", "surrogate"),
        (Name("\ud800"), "surrogate"),
        (pathlib.Path("\udcff"), "surrogate"),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(value, what):
    with pytest.raises(EncodeError, match=what) as caught:
        encode_value({"a": [0, value]}, "model.extra")
    assert caught.value.key == "model.extra"
    if what != "surrogate":
        assert "['a'][1]" in str(caught.value)


class Angry:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    @property
    def __class__(self) -> type:
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")


class AngryMapping(dict):
    def __iter__(self) -> Any:
        raise RuntimeError("no")

    keys = values = items = __len__ = __iter__  # type: ignore[assignment]


class Nameless:
    __module__ = 3  # type: ignore[assignment]


def looped(make: Any) -> Any:
    value = make()
    if isinstance(value, list):
        list.append(value, value)
    elif isinstance(value, deque):
        value.append(value)
    else:
        value["a"] = value
    return value


def odd_objects() -> list[Any]:
    settings = Settings(1)
    settings.lr = settings
    return [
        Angry(), Angry, Nameless(), [Angry()], {Angry(): 1}, {"a": Angry()}, (Angry(),), {(1, Angry()): 1},
        mock.Mock(), mock.MagicMock(), mock.Mock(spec=dict), mock.Mock(spec=np.ndarray), mock.Mock(spec=enum.Enum),
        mock.Mock(spec=Settings), mock.NonCallableMagicMock(spec=torch.Tensor), mock.call, mock.sentinel.a,
        sys, threading.Lock(), threading.RLock(), threading.local(), lambda: 0, (item for item in ()), iter([]),
        io.BytesIO(), sys.stdout, type, object, object(), NotImplemented, Ellipsis, types.SimpleNamespace(a=1),
        looped(list), looped(dict), looped(OrderedDict), looped(lambda: defaultdict(list)), looped(deque), settings,
        looped(Items), types.MappingProxyType({"a": 1}), {"a": 1}.keys(), memoryview(b"a"), zip(), re.compile("a"),
        torch.nn.Linear(1, 1), torch.ones(1), torch.ones(1).to_sparse(), torch.strided, torch.cpu, torch.jit,
        torch.float32.to_complex, torch.Generator, np.random, np.float32, np.dtype("O"), np.ones(1), np.errstate(),
        np.nditer(np.ones(1)), dataclasses.fields(Settings)[0], typing.Any, list[int], int | None, Exception("a"),
        contextlib.ExitStack(), subprocess, classmethod(len), property(len), super(Name, Name("a")), weird_enum(),
    ]  # fmt: skip


def weird_enum() -> Any:
    class Odd(enum.Enum):
        A = object()

    return Odd.A


def test_whatever_is_given_only_an_encode_error_is_raised():
    for number, value in enumerate(odd_objects()):
        for tree in (value, [value], {"a": (value, 1)}, OrderedDict(a=[value]), Settings(value), Point(1, value)):
            assert refused_at(tree) == "extra", f"odd object {number}"


def refused_at(tree: Any) -> str | None:
    """The key at which the tree is refused; None if it is not."""
    try:
        encode_value(tree, "extra")
    except EncodeError as error:
        return error.key
    return None


def test_mappings_whose_methods_fail_are_read_without_them():
    assert dict(dict.items(back(AngryMapping(a=1)))) == {"a": 1}
