"""Trees: leaves have exact paths and readable keys, and go back to the same tree."""

from __future__ import annotations

import enum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import DamagedError, EncodeError
from distckpt.format.tree.tree import (
    DictStep,
    KeyStep,
    Leaf,
    ListStep,
    RankStep,
    Step,
    TupleStep,
    decode_path,
    encode_path,
    flatten,
    key_of,
    unflatten,
)


class Array:
    """Stands for a tensor: all that this layer asks is whether something is one."""


class Color(enum.Enum):
    RED = 1


def is_array(value: object) -> bool:
    return isinstance(value, Array)


def at(*steps: str | Step) -> tuple[Step, ...]:
    return tuple(DictStep(step) if isinstance(step, str) else step for step in steps)


A, B, C = Array(), Array(), Array()

OPTIMIZER = {
    "state": {0: {"step": A, "exp_avg": B}, 1: {"step": C}},
    "param_groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}],
}


def test_leaves_of_an_optimizer():
    assert flatten(
        OPTIMIZER,
        is_array,
        at(
            "optimizer",
        ),
    ) == [
        Leaf(at("optimizer", "state", KeyStep(0), "step"), "optimizer.state.0.step", A),
        Leaf(at("optimizer", "state", KeyStep(0), "exp_avg"), "optimizer.state.0.exp_avg", B),
        Leaf(at("optimizer", "state", KeyStep(1), "step"), "optimizer.state.1.step", C),
        Leaf(at("optimizer", "param_groups"), "optimizer.param_groups", OPTIMIZER["param_groups"]),
    ]


def test_lists_and_tuples_are_entered_only_for_an_array_in_them():
    tree = {"a": [1, (A, {"lr": 2}, [])], "b": (1, [2]), "c": [], "d": {}, "e": {"f": {"g": None}}}
    assert [(leaf.key, leaf.value) for leaf in flatten(tree, is_array)] == [
        ("a.0", 1),
        ("a.1.0", A),
        ("a.1.1.lr", 2),
        ("a.1.2", []),
        ("b", (1, [2])),
        ("c", []),
        ("d", {}),
        ("e.f.g", None),
    ]


def test_per_rank_state_is_marked_in_the_key():
    (leaf,) = flatten({"cursor": 7}, is_array, at("loader", RankStep(3)))
    assert leaf == Leaf(at("loader", RankStep(3), "cursor"), "loader@3.cursor", 7)
    (leaf,) = flatten(5, is_array, at("seed", RankStep(0)))
    assert leaf.key == "seed@0"
    assert key_of(()) == ""
    assert key_of(at("", "a")) == ".a"


def test_a_leaf_alone_and_an_empty_tree():
    assert flatten(A, is_array) == [Leaf((), "", A)]
    assert flatten(
        {},
        is_array,
        at(
            "model",
        ),
    ) == [
        Leaf(
            at(
                "model",
            ),
            "model",
            {},
        )
    ]
    assert unflatten([((), A)]) is A
    assert unflatten([]) == {}


def test_paths_as_text():
    path = at("optimizer", "param_groups", ListStep(0), TupleStep(1), KeyStep(7), RankStep(3), "a.b")
    text = '["optimizer","param_groups",{"list":0},{"tuple":1},{"key":7},{"rank":3},"a.b"]'
    assert encode_path(path) == text
    assert decode_path(text, "index") == path
    assert key_of(path) == "optimizer.param_groups.0.1.7@3.a.b"


plain_keys = st.one_of(
    st.integers(), st.booleans(), st.none(), st.binary(), st.just(Color.RED), st.tuples(st.integers(), st.text("ab$"))
)
steps = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])).map(DictStep),
    plain_keys.map(KeyStep),
    st.integers(0, 10**9).map(ListStep),
    st.integers(0, 10**9).map(TupleStep),
    st.integers(0, 10**6).map(RankStep),
)


@settings(deadline=None)
@given(st.lists(steps, max_size=8).map(tuple))
def test_every_path_comes_back_from_its_text(path):
    decoded = decode_path(encode_path(path), "index")
    assert decoded == path
    assert [type(step) for step in decoded] == [type(step) for step in path]


dict_keys = st.one_of(st.text("abc", min_size=1), st.integers(), st.binary(min_size=1))
leaf_values = st.one_of(st.builds(Array), st.integers(), st.none(), st.text(), st.lists(st.integers()), st.just(()))
trees = st.recursive(
    leaf_values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(dict_keys, inner, max_size=4),
    ),
    max_leaves=25,
)


@settings(deadline=None)
@given(trees)
def test_a_tree_goes_back_together_from_its_leaves_in_any_order_of_texts(tree):
    try:
        leaves = flatten(tree, is_array)
    except EncodeError:
        return  # two keys that read alike, such as 1 and "1"
    parts = [(decode_path(encode_path(leaf.path), "index"), leaf.value) for leaf in leaves]
    rebuilt = unflatten(parts)
    assert rebuilt == tree
    assert repr(rebuilt) == repr(tree)  # order and types too
    assert unflatten(reversed(parts)) == tree


def test_ranks_come_back_as_a_list_in_their_order():
    parts = [(at("loader", RankStep(rank), "cursor"), rank * 10) for rank in (2, 0, 1)]
    assert unflatten(parts) == {"loader": [{"cursor": 0}, {"cursor": 10}, {"cursor": 20}]}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"a.b": A, "a": {"b": B}}, "a.b"),
        ({"s": {1: A, "1": B}}, "s.1"),
        ({"s": {1: 5, "1": 5}}, "s.1"),
    ],
)
def test_two_leaves_of_one_key_are_refused_by_name(tree, key):
    with pytest.raises(EncodeError, match="two leaves") as caught:
        flatten(tree, is_array)
    assert caught.value.key == key


def test_a_tree_that_holds_itself_is_refused():
    loop: dict[str, object] = {"a": A}
    loop["b"] = {"again": loop}
    with pytest.raises(EncodeError, match="holds itself"):
        flatten(loop, is_array)
    plain: list[object] = [1]
    plain.append((plain,))
    with pytest.raises(EncodeError, match="holds itself"):
        flatten({"x": plain}, is_array)
    mixed: list[object] = [A]
    mixed.append({"again": mixed})
    with pytest.raises(EncodeError, match="holds itself"):
        flatten({"x": mixed}, is_array)


def test_one_object_at_two_places_is_no_loop():
    shared = [A]
    assert [leaf.key for leaf in flatten({"a": shared, "b": [shared, shared]}, is_array)] == ["a.0", "b.0.0", "b.1.0"]


def test_a_tree_that_is_too_deep_is_refused():
    for wrap in (lambda inner: {"d": inner}, lambda inner: [inner]):
        tree: object = A
        for _ in range(5000):
            tree = wrap(tree)
        with pytest.raises(EncodeError, match="100 levels"):
            flatten(tree, is_array)


def test_a_dict_with_keys_that_cannot_be_stored_is_a_leaf():
    for key in (object(), float("nan"), A):
        tree = {"x": {key: 1}}
        assert flatten(tree, is_array) == [
            Leaf(
                at(
                    "x",
                ),
                "x",
                tree["x"],
            )
        ]


def test_keys_of_other_plain_types_keep_their_type():
    tree = {np.int64(3): A, Color.RED: B, True: C, np.str_("s"): 1}
    leaves = flatten(tree, is_array)
    rebuilt = unflatten((decode_path(encode_path(leaf.path), "index"), leaf.value) for leaf in leaves)
    assert rebuilt == tree
    assert [type(key) for key in rebuilt] == [type(key) for key in tree]


def test_half_a_surrogate_pair_in_a_key_is_refused():
    with pytest.raises(EncodeError, match="surrogate"):
        encode_path(at("a", "\ud800"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[null]",
        '["a"',
        "[{}]",
        '[{"list":0,"tuple":0}]',
        '[{"list":-1}]',
        '[{"list":true}]',
        '[{"list":0.0}]',
        '[{"rank":"3"}]',
        '[{"item":1}]',
        '[{"key":"a"}]',
        '[{"key":[1]}]',
        '[{"key":{"$object":1}}]',
        '[{"key":1,"list":0}]',
        "[" + ",".join(['"a"'] * 10_000) + "]",
        '[{"key":' + "[" * 50_000 + "]" * 50_000 + "}]",
    ],
)
def test_any_other_text_of_a_path_is_damage(text):
    with pytest.raises(DamagedError) as caught:
        decode_path(text, "ckpt-7/index.arrow")
    assert caught.value.path == "ckpt-7/index.arrow"


@pytest.mark.parametrize(
    "paths",
    [
        [("a",), ("a",)],
        [("a",), ("a", "b")],
        [("a", "b"), ("a",)],
        [(), ("a",)],
        [("a",), ()],
        [("a", "b"), ("a", ListStep(0))],
        [("a", TupleStep(0)), ("a", ListStep(1))],
        [("a", ListStep(1))],
        [("a", ListStep(0)), ("a", ListStep(2))],
        [("a", TupleStep(1))],
        [("a", RankStep(0)), ("a", "b")],
    ],
)
def test_leaves_that_do_not_make_a_tree_are_refused(paths):
    with pytest.raises(ValueError):
        unflatten((at(*path), None) for path in paths)
