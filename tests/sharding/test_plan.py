"""Plans: every distinct chunk is written exactly once, by a rank that holds it, and nothing that does not add up passes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.planning import LAYOUTS, describe, model
from distckpt.errors import PlanError
from distckpt.format.tree.path import DictStep, RankStep, encode_path
from distckpt.sharding.balance import spread
from distckpt.sharding.coverage import Boxes, find_hole, find_overlap
from distckpt.sharding.description import Row, build_description, decode_description
from distckpt.sharding.plan import ShardingPlan, make_plan

Box = tuple[tuple[int, ...], tuple[int, ...]]
Held = Mapping[int, Sequence[Row]]


def part(key: str, shape: Sequence[int], offset: Sequence[int], length: Sequence[int]) -> Row:
    """A chunk of a float32 tensor."""
    return Row(key, f'["{key}"]', "float32", tuple(shape), tuple(offset), tuple(length), 4 * math.prod(length))


def whole(key: str, *shape: int) -> Row:
    return part(key, shape, (0,) * len(shape), shape)


def value(key: str, crc: int | None) -> Row:
    return Row(key, f'["{key}"]', "json", (), (), (), 0, crc)


def encoded(held: Held) -> dict[int, bytes]:
    return {rank: build_description(rows).encode() for rank, rows in held.items()}


def planned(held: Held, staged: Mapping[int, Sequence[int]] | None = None, number: int | None = 7) -> ShardingPlan:
    return make_plan(number, encoded(held), {rank: as_bytes(rows) for rank, rows in (staged or {}).items()})


def as_bytes(rows: Sequence[int]) -> bytes:
    return np.array(rows, "<i4").tobytes()


def rows_of(plan: ShardingPlan, rank: int) -> list[int]:
    return np.frombuffer(plan.rows(rank), "<i4").tolist()


def chunk_of(row: Row) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return row.key, row.offset, row.length


def assert_writes_everything_once(plan: ShardingPlan, held: Held) -> None:
    """The promise of a plan, checked against the rows that it hands out and against its table."""
    written = [(rank, held[rank][row]) for rank in held for row in rows_of(plan, rank)]
    assert sorted(chunk_of(row) for _, row in written) == sorted(
        {chunk_of(row) for rows in held.values() for row in rows}
    )
    assert plan.world_size == len(held)
    assert [plan.row_count(rank) for rank in held] == [len(rows_of(plan, rank)) for rank in held]
    assert all(rows_of(plan, rank) == sorted(rows_of(plan, rank)) for rank in held)
    names = ["key", "path", "dtype", "shape", "offset", "length", "nbytes", "rank"]
    assert [[record[name] for name in names] for record in plan.table.to_pylist()] == [
        [*(row.key, row.path, row.dtype, list(row.shape), list(row.offset), list(row.length), row.nbytes), rank]
        for rank, row in written
    ]


# ---- tilings of any form -----------------------------------------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn, low: tuple[int, ...], high: tuple[int, ...], depth: int = 4) -> list[Box]:
    """Boxes (low, high) that tile the given box: cuts, cuts of cuts, and pinwheels that no straight cut parts."""
    wide = [dim for dim in range(len(low)) if high[dim] - low[dim] > 1]
    if depth == 0 or not wide or draw(st.integers(0, 3)) == 0:
        return [(low, high)]
    pairs = [pair for pair in itertools.combinations(wide, 2) if all(high[dim] - low[dim] > 2 for dim in pair)]
    boxes = _pinwheel(low, high, *draw(st.sampled_from(pairs))) if pairs and draw(st.booleans()) else None
    if boxes is None:
        dim = draw(st.sampled_from(wide))
        cut = draw(st.integers(low[dim] + 1, high[dim] - 1))
        boxes = [(low, _with(high, dim, cut)), (_with(low, dim, cut), high)]
    return [inner for box in boxes for inner in draw(tilings(*box, depth - 1))]


def _with(point: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*point[:dim], value, *point[dim + 1 :])


def _pinwheel(low: tuple[int, ...], high: tuple[int, ...], a: int, b: int) -> list[Box]:
    la, lb, ha, hb = low[a], low[b], high[a], high[b]
    corners = [
        ((la, lb), (la + 1, hb - 1)),
        ((la, hb - 1), (ha - 1, hb)),
        ((ha - 1, lb + 1), (ha, hb)),
        ((la + 1, lb), (ha, lb + 1)),
        ((la + 1, lb + 1), (ha - 1, hb - 1)),
    ]
    return [(_with(_with(low, a, x), b, y), _with(_with(high, a, u), b, v)) for (x, y), (u, v) in corners]


SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@st.composite
def tiled(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    return shape, draw(tilings((0,) * len(shape), shape))


def boxes_of(boxes: Sequence[Box], ndim: int) -> Boxes:
    """Boxes of one tensor."""
    low = [np.array([box[0][dim] for box in boxes], np.int64) for dim in range(ndim)]
    high = [np.array([box[1][dim] for box in boxes], np.int64) for dim in range(ndim)]
    return Boxes(np.zeros(len(boxes), np.int64), low, high)


def covered(shape: Sequence[int], boxes: Sequence[Box]) -> np.ndarray:
    """How often each element is covered."""
    count = np.zeros(shape, int)
    for low, high in boxes:
        count[tuple(slice(*ends) for ends in zip(low, high, strict=True))] += 1
    return count


@given(tiled())
@settings(deadline=None)
def test_no_overlap_is_seen_in_a_tiling(tensor: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = tensor
    assert (covered(shape, boxes) == 1).all()
    assert find_overlap(boxes_of(boxes, len(shape))) is None
    with pytest.raises(ValueError, match="cover the whole tensor"):
        find_hole((*shape, 1), boxes_of([((*low, 0), (*high, 1)) for low, high in boxes], len(shape) + 1))


@given(st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), min_size=3, max_size=3), max_size=12))
@settings(deadline=None)
def test_overlaps_are_found_exactly_when_there_are_some(drawn: list[list[tuple[int, int]]]) -> None:
    boxes = [(tuple(low for low, _ in box), tuple(low + size for low, size in box)) for box in drawn]
    pair = find_overlap(boxes_of(boxes, 3))
    if (covered((12, 12, 12), boxes) <= 1).all():
        assert pair is None
    else:
        assert pair is not None
        assert (covered((12, 12, 12), [boxes[pair[0]], boxes[pair[1]]]) == 2).any()


def test_overlaps_are_found_among_huge_coordinates_and_in_the_right_tensor() -> None:
    far = 1 << 61
    low, high = np.array([0, far, 0, far - 1]), np.array([far, far + 9, far, far + 9])
    assert find_overlap(Boxes(np.array([0, 0, 1, 1]), [low], [high])) == (2, 3)
    assert find_overlap(Boxes(np.array([0, 0, 1, 2]), [low], [high])) is None


@given(tiled(), st.data())
@settings(deadline=None)
def test_a_hole_that_is_found_is_one(tensor: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = tensor
    assume(shape)
    left = [box for box in boxes if data.draw(st.booleans())]
    assume(len(left) < len(boxes))
    offset, length = find_hole(shape, boxes_of(left, len(shape)))
    assert math.prod(length) > 0
    hole = tuple(slice(begin, begin + size) for begin, size in zip(offset, length, strict=True))
    assert covered(shape, left)[hole].shape == length
    assert (covered(shape, left)[hole] == 0).all()


# ---- whole plans -------------------------------------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> dict[int, list[Row]]:
    """Tensors tiled in any way, values and empty tensors, each chunk held by some of the ranks, in any order."""
    held: dict[int, list[Row]] = {rank: [] for rank in range(draw(st.integers(1, 6)))}
    ranks = st.sets(st.sampled_from(sorted(held)), min_size=1)
    for number in range(draw(st.integers(0, 4))):
        shape, boxes = draw(tiled())
        for low, high in boxes:
            row = part(f"t{number}", shape, low, [end - begin for begin, end in zip(low, high, strict=True)])
            for rank in draw(ranks):
                held[rank].append(row)
    for number, row in enumerate([value("step", 99), value("rng@1", None), whole("nothing", 0, 3), whole("scalar")]):
        if draw(st.booleans()):
            for rank in draw(ranks) if number else held:
                held[rank].append(row)
    return {rank: draw(st.permutations(rows)) for rank, rows in held.items()}


@given(worlds())
@settings(deadline=None)
def test_every_distinct_chunk_is_written_once_by_a_holder(held: dict[int, list[Row]]) -> None:
    assert_writes_everything_once(planned(held), held)


@given(worlds(), st.data())
@settings(deadline=None)
def test_ranks_that_have_copied_keep_their_rows_and_get_no_others(
    held: dict[int, list[Row]], data: st.DataObject
) -> None:
    before = planned(held)
    staged = {rank: rows_of(before, rank) for rank in held if data.draw(st.booleans())}
    plan = planned(held, staged)
    assert_writes_everything_once(plan, held)
    assert {rank: rows_of(plan, rank) for rank in staged} == staged


@given(worlds())
@settings(deadline=None)
def test_a_missing_chunk_never_passes(held: dict[int, list[Row]]) -> None:
    rows = {chunk_of(row): row for rank in held for row in held[rank] if row.dtype == "float32" and row.nbytes}
    by_key = {row.key: row for row in rows.values() if sum(other.key == row.key for other in rows.values()) > 1}
    for lost in by_key.values():
        left = {rank: [row for row in mine if chunk_of(row) != chunk_of(lost)] for rank, mine in held.items()}
        with pytest.raises(PlanError, match="no rank holds the part at offset") as caught:
            planned(left)
        assert caught.value.key == lost.key


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=200), st.lists(st.integers(0, 30_000), min_size=1, max_size=9)
)
@settings(deadline=None)
def test_work_is_spread_evenly_over_what_is_there_already(sizes: list[int], load: list[int]) -> None:
    taken = spread(np.array(sizes), np.array(load))
    after = np.array(load) + np.bincount(taken, weights=sizes, minlength=len(load))
    busy = np.unique(taken)
    assert after[busy].max() - after.min() <= 2 * max(sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_layouts_are_balanced_by_bytes(layout: str) -> None:
    ranks, tensors = 64, model(100)
    plan = make_plan(1, dict(enumerate(describe(LAYOUTS[layout](ranks), tensors))), {})
    nbytes, rank = np.array(plan.table["nbytes"]), np.array(plan.table["rank"])
    assert nbytes.sum() == sum(2 * math.prod(tensor.shape) for tensor in tensors)
    load = np.bincount(rank, weights=nbytes, minlength=ranks)
    assert load.max() - load.min() <= nbytes.max() * 1.01


def test_plain_values_are_spread_too() -> None:
    plan = planned({rank: [value(f"v{number}", number) for number in range(40)] for rank in range(4)})
    assert [plan.row_count(rank) for rank in range(4)] == [10, 10, 10, 10]


def test_ranks_that_hold_more_alone_write_less_of_what_is_shared() -> None:
    shared = [whole(f"s{number:02}", 100_000) for number in range(30)]
    plan = planned({0: [*shared, whole("mine", 1_500_000)], 1: shared, 2: shared})
    assert [plan.row_count(rank) for rank in range(3)] == [1, 15, 15]


def test_ranks_without_anything_are_part_of_the_plan() -> None:
    plan = planned({0: [], 1: [whole("w", 4)], 2: []})
    assert [plan.row_count(rank) for rank in range(3)] == [0, 1, 0]
    assert planned({0: []}).table.num_rows == 0
    with pytest.raises(ValueError, match="ranks 0 to 2"):
        plan.rows(-1)


def test_the_table_is_typed_and_compact() -> None:
    schema = planned({0: [whole("w", 4)]}).table.schema
    for name in ("key", "path", "dtype"):
        assert schema.field(name).type == pa.dictionary(pa.int32(), pa.utf8())
    for name in ("shape", "offset", "length"):
        assert schema.field(name).type == pa.list_(pa.int64())
    assert (schema.field("rank").type, schema.field("nbytes").type) == (pa.int32(), pa.int64())


def test_the_plan_id_follows_descriptions_and_assignment_but_not_values() -> None:
    held = {rank: [whole("w", 4), value("step", 1)] for rank in range(2)}
    later = {rank: [whole("w", 4), value("step", 2)] for rank in range(2)}
    wider = {rank: [whole("w", 5), value("step", 1)] for rank in range(2)}
    plan = planned(held)
    assert plan.plan_id == planned(held).plan_id == planned(later).plan_id
    assert plan.plan_id != planned(wider).plan_id
    swapped = planned(held, {0: rows_of(plan, 1), 1: rows_of(plan, 0)})
    assert plan.plan_id != swapped.plan_id
    assert plan.plan_id != planned({**held, 2: []}).plan_id


# ---- what is refused ---------------------------------------------------------------------------------------------------


def refused(held: Held, message: str, staged: Mapping[int, Sequence[int]] | None = None) -> PlanError:
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        planned(held, staged)
    assert "checkpoint 7 was not saved" in str(caught.value)
    return caught.value


def test_ranks_that_disagree_are_named_with_what_they_say() -> None:
    error = refused(
        {0: [whole("w", 4, 4)], 1: [whole("w", 4, 4)], 2: [whole("w", 8, 4)]},
        "the ranks do not agree on its shape: ranks 0-1 say [4, 4]; rank 2 says [8, 4]",
    )
    assert (error.key, error.ranks, error.number) == ("w", (0, 1, 2), 7)
    half = Row("w", '["w"]', "bfloat16", (4,), (0,), (4,), 8)
    refused({0: [whole("w", 4)], 1: [half]}, "its dtype: rank 0 says float32; rank 1 says bfloat16")
    other = Row("w", '["x","w"]', "float32", (4,), (0,), (4,), 16)
    refused({0: [whole("w", 4)], 1: [other]}, """its path: rank 0 says ["w"]; rank 1 says ["x","w"]""")


def test_a_hole_is_named_with_its_place() -> None:
    error = refused(
        {0: [part("w", (8, 4), (0, 0), (3, 4))], 1: [part("w", (8, 4), (5, 0), (3, 4))], 2: [whole("v", 2)]},
        "no rank holds the part at offset [3, 0] of length [2, 4] of its shape [8, 4]; ranks 0-1 together hold 24",
    )
    assert (error.key, error.ranks) == ("w", (0, 1))
    refused({0: [part("w", (8,), (0,), (6,))]}, "at offset [6] of length [2]")
    refused(
        {0: [part("w", (4, 4), (0, 0), (2, 2)), part("w", (4, 4), (2, 0), (2, 4))]}, "at offset [0, 2] of length [2, 2]"
    )
    of_one = Row("w@0", encode_path((DictStep("w"), RankStep(0))), "float32", (8,), (0,), (4,), 16)
    refused({0: [of_one]}, "rank 0 together hold 4 elements. It is in a PerRank, which each rank has by itself")


def test_overlaps_are_refused() -> None:
    error = refused(
        {0: [part("w", (8,), (0,), (5,))], 1: [], 2: [part("w", (8,), (4,), (4,))]},
        "two different parts overlap: offset [0] length [5] on rank 0 and offset [4] length [4] on rank 2",
    )
    assert (error.key, error.ranks) == ("w", (0, 2))
    refused({0: [part("w", (8,), (0,), (8,))], 1: [part("w", (8,), (0,), (4,))]}, "two different parts overlap")
    # As many elements as the tensor has, but one is there twice and one is missing.
    refused({0: [part("w", (4,), (0,), (2,)), part("w", (4,), (1,), (2,))]}, "two different parts overlap")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (part("w", (8,), (4,), (5,)), "offset [4] length [5] is no part of a tensor of shape [8]"),
        (part("w", (8,), (-1,), (4,)), "is no part of a tensor"),
        (part("w", (8,), (8,), (0,)), "is no part of a tensor"),
        (part("w", (8, 2), (0,), (8,)), "is no part of a tensor"),
        (part("w", (0, 2), (0, 0), (0, 1)), "is no part of a tensor"),
        (part("w", (-1, -1), (0, 0), (1, 1)), "is no part of a tensor"),
        (Row("w", "[]", "int8", (1 << 40, 1 << 40), (0, 0), (1, 1), 1), "is no part of a tensor"),
        (
            Row("w", "[]", "float32", (4,), (0,), (4,), 15),
            "15 bytes are not what offset [0] length [4] of dtype 'float32'",
        ),
        (Row("w", "[]", "float7", (0,), (0,), (0,), 0), "of dtype 'float7'"),
    ],
)
def test_rectangles_that_cannot_be_are_refused(row: Row, message: str) -> None:
    error = refused({0: [], 1: [row]}, message)
    assert (error.key, error.ranks) == ("w", (1,))


def test_a_rank_may_not_describe_a_chunk_twice() -> None:
    error = refused(
        {0: [whole("w", 4)], 1: [whole("w", 4), value("v", None), whole("w", 4)]}, "describes the same chunk twice"
    )
    assert (error.key, error.ranks) == ("w", (1,))


def test_shared_values_must_be_equal() -> None:
    held = {0: [value("epoch", 5)], 1: [value("epoch", 5)], 2: [value("epoch", 6)]}
    error = refused(held, "rank 2 holds another value than ranks 0-1. Make it the same on all ranks, give")
    assert "distckpt.PerRank" in str(error)
    assert (error.key, error.ranks) == ("epoch", (0, 1, 2))


def test_a_description_that_cannot_be_read_names_its_rank() -> None:
    good = encoded({0: [whole("w", 4)]})[0]
    other = pa.BufferOutputStream()
    with pa.ipc.new_stream(other, pa.schema([("key", pa.utf8())])) as writer:
        writer.write_table(pa.table({"key": ["w"]}))
    for bad in (b"", b"what is this", good[:-64], bytes(other.getvalue())):
        with pytest.raises(PlanError, match="not a description") as caught:
            make_plan(None, {0: good, 1: bad}, {})
        assert caught.value.ranks == (1,)
    with pytest.raises(ValueError, match="every rank"):
        make_plan(1, {0: good, 2: good}, {})
    with pytest.raises(ValueError, match="every rank"):
        make_plan(1, {}, {})


# ---- staged ranks that do not fit -------------------------------------------------------------------------------------


def test_a_chunk_that_only_staged_ranks_hold_and_none_copied() -> None:
    both = [whole("w", 4), whole("v", 4)]
    error = refused(
        {0: both, 1: both, 2: []}, "did not copy it: the structure changed on some ranks only", {0: [1], 1: []}
    )
    assert (error.key, error.ranks) == ("w", (0, 1))
    assert "the next save plans afresh and will succeed" in str(error)


def test_a_chunk_that_two_staged_ranks_copied() -> None:
    error = refused(
        {0: [whole("w", 4)], 1: [whole("w", 4)]}, "was copied by both: the structure changed", {0: [0], 1: [0]}
    )
    assert (error.key, error.ranks) == ("w", (0, 1))


def test_what_a_staged_rank_left_goes_to_others() -> None:
    both = [whole("w", 4), whole("v", 4)]
    plan = planned({0: both, 1: both}, {0: []})
    assert (rows_of(plan, 0), rows_of(plan, 1)) == ([], [0, 1])


@pytest.mark.parametrize("rows", [[2], [-1], [0, 0]])
def test_staged_rows_that_cannot_be_are_refused(rows: list[int]) -> None:
    error = refused({0: [], 1: [whole("w", 4), whole("v", 4)]}, "are not distinct rows of the 2", {1: rows})
    assert error.ranks == (1,)


def test_staged_rows_that_are_no_int32_are_refused() -> None:
    with pytest.raises(PlanError, match="not distinct rows"):
        make_plan(1, encoded({0: [whole("w", 4)]}), {0: b"\0\0\0"})
    with pytest.raises(ValueError, match="there are 1 ranks"):
        make_plan(1, encoded({0: [whole("w", 4)]}), {1: b""})


# ---- descriptions ------------------------------------------------------------------------------------------------------


def test_descriptions_survive_the_way_to_the_coordinator() -> None:
    rows = [whole("w", 4, 2), value("step", 7), value("rng@3", None), whole("nothing", 0), whole("scalar")]
    description = build_description(rows)
    table = decode_description(description.encode())
    assert table.equals(description.table)
    assert [
        Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in table.to_pylist()
    ] == rows
    assert decode_description(build_description([]).encode()).num_rows == 0


def test_the_digest_covers_everything_but_the_values() -> None:
    rows = [whole("w", 4, 2), value("step", 7)]
    digest = build_description(rows).digest
    assert build_description([whole("w", 4, 2), value("step", 8)]).digest == digest
    others = [rows[::-1], rows[:1], [whole("w", 2, 4), rows[1]], [part("w", (4, 2), (0, 0), (2, 2)), rows[1]]]
    assert digest not in {build_description(other).digest for other in others}
