"""Trees with other containers than dicts, lists and tuples: readable keys, and the same types when they come back."""

from __future__ import annotations

import contextlib
import sys
import typing
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.classes import Unresolved
from distckpt.format.tree.path import DictStep, KeyStep, ListStep, TypedStep, decode_path, encode_path
from distckpt.format.tree.select import select_paths
from distckpt.format.tree.tree import flatten, unflatten
from distckpt.format.tree.values import encode_value


class Array:
    """Stands for a tensor."""


def is_array(value: object) -> bool:
    return type(value) is Array


A, B = Array(), Array()
Point = namedtuple("Point", "x y")  # noqa: PYI024


class Pair(typing.NamedTuple):
    left: Any
    right: Any


@dataclass
class Memory:
    buffer: Any
    cursor: Any = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    one: Any
    two: Any


class Config(dict):
    pass


class Layers(list):
    pass


class Row(tuple):
    __slots__ = ()


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "never shown"


def through_text(tree: Any) -> Any:
    leaves = flatten(tree, is_array)
    parts = [(decode_path(encode_path(leaf.path), "index"), leaf.value) for leaf in leaves]
    assert [path for path, _ in parts] == [leaf.path for leaf in leaves]
    return unflatten(parts)


def encoded(tree: Any) -> list[bytes]:
    return [encode_value(leaf.value, leaf.key) for leaf in flatten(tree, is_array) if not is_array(leaf.value)]


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return factories and [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        limits = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return limits and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Memory | Frozen):
        return all(same(getattr(one, name), getattr(other, name)) for name in type(one).__match_args__)
    return bool(one == other)


keys = st.one_of(st.text("abc", min_size=1, max_size=2), st.integers(10, 99), st.binary(min_size=1, max_size=2))
trees = st.recursive(
    st.one_of(st.builds(Array), st.integers(), st.none(), st.just({}), st.just(()), st.just(OrderedDict())),
    lambda inner: st.one_of(
        st.builds(Point, inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Memory, inner, inner),
        st.builds(Frozen, inner, inner),
        st.lists(inner, max_size=3).map(Layers),
        st.lists(inner, max_size=3).map(Row),
        st.lists(inner, max_size=3).map(lambda items: deque(items, 5)),
        st.lists(inner, max_size=3).map(deque),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(Counter),
        st.dictionaries(keys, inner, max_size=3).map(Config),
        st.dictionaries(keys, inner, max_size=3),
        st.builds(defaultdict, st.sampled_from([None, list, dict, int]), st.dictionaries(keys, inner, max_size=3)),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(trees)
def test_every_container_comes_back_as_the_type_that_it_was(tree):
    with contextlib.suppress(EncodeError):  # two keys that read alike
        assert same(through_text(tree), tree)


def test_keys_stay_what_people_write():
    tree = {
        "memory": Memory(OrderedDict([("obs.x", A), (7, B)]), deque([A, 1])),
        "point": Point([A], 2),
        "named": {Name("a"): A},
    }
    assert [leaf.key for leaf in flatten(tree, is_array)] == [
        "memory.buffer.obs.x",
        "memory.buffer.7",
        "memory.cursor.0",
        "memory.cursor.1",
        "point.x.0",
        "point.y",
        "named.a",
    ]
    assert same(through_text(tree), tree)
    assert type(next(iter(through_text(tree)["named"]))) is Name


def test_a_container_without_a_tensor_is_one_leaf():
    for value in (
        OrderedDict(a=1),
        Counter("ab"),
        Point(1, [2]),
        Memory({}),
        deque([1]),
        Config(a=1),
        defaultdict(list),
    ):
        assert [(leaf.key, leaf.value) for leaf in flatten({"x": value}, is_array)] == [("x", value)]


def test_paths_of_typed_containers_as_text():
    of = ("OrderedDict",)
    path = (
        DictStep("a"),
        TypedStep(of, DictStep("w")),
        TypedStep(of, KeyStep(7)),
        TypedStep(("deque", 5), ListStep(0)),
        TypedStep(("defaultdict", "list"), DictStep("b")),
        TypedStep(("dataclass", "train", "State"), DictStep("best")),
        TypedStep(("subclass", "train", "Layers", "list"), ListStep(1)),
    )
    text = (
        '["a",{"of":["OrderedDict"],"name":"w"},{"key":7,"of":["OrderedDict"]},{"list":0,"of":["deque",5]},'
        '{"of":["defaultdict","list"],"name":"b"},{"of":["dataclass","train","State"],"name":"best"},'
        '{"list":1,"of":["subclass","train","Layers","list"]}]'
    )
    assert encode_path(path) == text
    assert decode_path(text, "index") == path


@pytest.mark.parametrize(
    "text",
    [
        '[{"name":"a"}]',
        '[{"of":["OrderedDict"]}]',
        '[{"of":"OrderedDict","name":"a"}]',
        '[{"of":["dict"],"name":"a"}]',
        '[{"of":["OrderedDict",1],"name":"a"}]',
        '[{"of":["OrderedDict"],"list":0}]',
        '[{"of":["OrderedDict"],"name":"a","list":0}]',
        '[{"of":["OrderedDict"],"tuple":0}]',
        '[{"of":["OrderedDict"],"rank":0}]',
        '[{"of":["OrderedDict"],"key":"a"}]',
        '[{"of":["deque",-1],"list":0}]',
        '[{"of":["deque"],"list":0}]',
        '[{"of":["deque",null],"name":"a"}]',
        '[{"of":["deque",null],"list":-1}]',
        '[{"of":["defaultdict","eval"],"name":"a"}]',
        '[{"of":["defaultdict",["list"]],"name":"a"}]',
        '[{"of":["dataclass","a"],"name":"a"}]',
        '[{"of":["dataclass","a","b"],"key":1}]',
        '[{"of":["dataclass","a",1],"name":"a"}]',
        '[{"of":["subclass","a","b","set"],"name":"a"}]',
        '[{"of":[],"name":"a"}]',
        '[{"of":{},"name":"a"}]',
        '[{"key":{"$dataclass":["a","b",{"c":1}]}}]',
    ],
)
def test_any_other_text_of_a_typed_step_is_damage(text):
    with pytest.raises(DamagedError):
        decode_path(text, "index")


def test_leaves_that_do_not_make_a_container_are_refused():
    def typed(*kind, name):
        return TypedStep(kind, ListStep(name) if isinstance(name, int) else DictStep(name))

    for one, other in (
        (typed("OrderedDict", name="a"), DictStep("b")),
        (typed("OrderedDict", name="a"), typed("Counter", name="b")),
        (typed("deque", None, name=0), typed("deque", None, name=2)),
        (typed("deque", 1, name=0), typed("deque", 1, name=1)),
        (typed("deque", None, name=0), ListStep(1)),
    ):
        with pytest.raises(ValueError):
            unflatten([((one,), 1), ((other,), 2)])


def test_a_class_that_is_not_imported_is_described_with_its_tensors_and_saved_again():
    for kind, step in (
        (("dataclass", "this", "Nothing"), DictStep("w")),
        (("namedtuple", "this", "No"), DictStep("w")),
    ):
        path = (DictStep("a"), TypedStep(kind, step))
        found = unflatten([(path, A)])["a"]
        assert found == Unresolved(kind[0], f"this:{kind[2]}", (("w", A),))
        assert [leaf.path for leaf in flatten({"a": found}, is_array)] == [path]
    path = (DictStep("a"), TypedStep(("subclass", "this", "Layers", "list"), ListStep(0)))
    found = unflatten([(path, A)])["a"]
    assert found == Unresolved("subclass", "this:Layers", [A])
    assert [leaf.path for leaf in flatten({"a": found}, is_array)] == [path]
    assert "this" not in sys.modules


def test_a_part_of_a_typed_container_can_be_selected():
    tree = {"model": OrderedDict([("layers.0.w", A), ("layers.1.w", B), ("head", 1)]), "memory": Memory(A)}
    leaves = flatten(tree, is_array)
    texts = {leaf.key: encode_path(leaf.path) for leaf in leaves}
    found = {leaf.key: leaf.value for leaf in leaves}

    def selected(selector: str) -> Any:
        return unflatten((path, found[key]) for key, path in select_paths(texts, selector, "here").items())

    assert same(selected("model"), tree["model"])
    assert same(selected("model.layers"), OrderedDict([("0.w", A), ("1.w", B)]))
    assert same(selected("memory"), tree["memory"])
    assert selected("memory.buffer") is A


def test_a_tensor_in_a_container_that_would_not_come_back_is_refused_by_name():
    @dataclass
    class Local:
        value: Any

    more = Memory(A)
    more.extra = 1  # type: ignore[attr-defined]
    noted = OrderedDict(a=A)
    noted.extra = 1  # type: ignore[attr-defined]
    for value, what in (
        (defaultdict(lambda: 0, a=A), "factory"),
        (noted, "attributes"),
        (Local(A), "inside a function"),
        (more, "extra"),
        ({Point(1, 2): A}, "Array"),
    ):
        with pytest.raises(EncodeError, match=what) as caught:
            encoded({"x": {"y": value}})
        assert caught.value.key == "x.y"


def test_a_typed_container_that_holds_itself_is_refused():
    for value in (OrderedDict(a=A), Config(a=A), defaultdict(list, a=A)):
        value["self"] = value
        with pytest.raises(EncodeError, match="holds itself"):
            flatten({"x": value}, is_array)
    memory = Memory(A)
    memory.cursor = [memory]
    with pytest.raises(EncodeError, match="holds itself"):
        flatten({"x": memory}, is_array)


def test_what_torch_notes_on_a_state_dict_is_no_part_of_it():
    state = OrderedDict(w=A)
    state._metadata = OrderedDict()  # type: ignore[attr-defined]
    assert same(through_text({"state": state})["state"], OrderedDict(w=A))


class Failing:
    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")


class FailingMapping(dict):
    def items(self) -> Any:
        raise RuntimeError("no")

    __iter__ = keys = values = __len__ = items  # type: ignore[assignment]


def test_walking_through_odd_objects_raises_nothing_foreign():
    assert same(through_text({"x": FailingMapping(a=A)})["x"].get("a"), A)
    for value in ({Failing(): A}, {(Failing(), 1): 1}, [Failing(), A], Memory(Failing()), OrderedDict({Failing(): A})):
        assert flatten({"x": value}, is_array)

    def failing(value: object) -> bool:
        raise RuntimeError("no")

    with pytest.raises(EncodeError, match="RuntimeError"):
        flatten({"x": object()}, failing)
