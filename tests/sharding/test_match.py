"""Matching what is wanted with what is stored, against a model that looks at every single element."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.format.arrow.index import Index
from distckpt.sharding.match import Transfers, Wanted, match
from tests.support.boxes import ITEM, chunks_of, part_of, slices, split
from tests.support.part import examples
from tests.support.stored import Chunk, stored, value, whole


def placed(index: Index, transfers: Transfers, chunks: dict[int, bytes]) -> list[bytearray]:
    """Carry out the transfers one element at a time, as the arrays say, and check what they say of runs of bytes."""
    filled = [bytearray(b"?" * int(size)) for size in transfers.wanted_nbytes]
    for number in range(len(transfers)):
        row, wanted = int(transfers.row[number]), int(transfers.wanted[number])
        source, target = elements(index, transfers, number)
        item = int(transfers.nbytes[number]) // len(source)
        for at, to in zip(source, target, strict=True):
            filled[wanted][to : to + item] = chunks[row][at : at + item]
        assert transfers.chunk_start[number] == source[0]
        assert transfers.wanted_start[number] == target[0]
        assert transfers.span[number] == source[-1] - source[0] + item
        assert transfers.direct[number] == (is_run(source, item) and is_run(target, item))
    return filled


def elements(index: Index, transfers: Transfers, number: int) -> tuple[list[int], list[int]]:
    """Byte positions of every element in the chunk and in the wanted memory, in row-major order."""
    row, wanted = int(transfers.row[number]), int(transfers.wanted[number])
    start, length = transfers.start[number], transfers.length[number]
    item = int(index.item_sizes[index.key[row]]) or int(index.size[row])
    coordinates = np.array(list(itertools.product(*map(range, length.tolist())))) + start
    places = []
    for offset, box in (
        (index.offset[row], index.length[row]),
        (transfers.wanted_offset[wanted], transfers.wanted_length[wanted]),
    ):
        assert np.all((coordinates >= offset) & (coordinates < offset + box))
        places.append((np.ravel_multi_index((coordinates - offset).T, tuple(box)) * item).tolist())
    return places[0], places[1]


def is_run(places: list[int], item: int) -> bool:
    return places == list(range(places[0], places[0] + len(places) * item, item))


def bytes_by_row(index: Index, chunks: Sequence[Chunk]) -> dict[int, bytes]:
    ordered = sorted(chunks, key=lambda chunk: (chunk.rank, chunk.shard))
    assert [chunk.key for chunk in ordered] == [index.names[key] for key in index.key.tolist()]
    return {row: chunk.data for row, chunk in enumerate(ordered)}


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from(sorted(ITEM)),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_any_tiling_fills_any_rectangle(shapes: list[list[int]], item: int, cuts: int, rng: random.Random) -> None:
    tensors = {
        f"t{n}": np.frombuffer(rng.randbytes(math.prod(shape) * item), np.uint8).reshape(*shape, item)
        for n, shape in enumerate(shapes)
    }
    chunks = [
        chunk
        for key, tensor in tensors.items()
        for chunk in chunks_of(key, tensor, split(((0,) * (tensor.ndim - 1), tensor.shape[:-1]), rng, cuts), item, rng)
    ]
    index = stored(chunks)
    wanted = [
        Wanted(key, *part_of(tensor.shape[:-1], rng))
        for key, tensor in tensors.items()
        for _ in range(rng.randint(0, 3))
    ]
    transfers = match(index, wanted)
    assert transfers.uncovered == ()
    assert transfers.wanted.tolist() == sorted(transfers.wanted.tolist())
    expected = [tensors[one.key][slices((one.offset, one.length))].tobytes() for one in wanted]
    assert list(map(bytes, placed(index, transfers, bytes_by_row(index, chunks)))) == expected


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    st.integers(1, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_holes_and_overlaps_are_told(shape: tuple[int, ...], cuts: int, moved: bool, rng: random.Random) -> None:
    """One chunk may lie elsewhere than it should: the volume is right all the same."""
    boxes = split(((0,) * len(shape), shape), rng, cuts)
    if moved:
        victim = rng.randrange(len(boxes))
        length = boxes[victim][1]
        boxes[victim] = (tuple(rng.randint(0, most - size) for most, size in zip(shape, length, strict=True)), length)
    index = stored([*chunks_of("t", np.zeros((*shape, 1), np.uint8), boxes, 1, rng), whole("other", b"123")])
    wanted = [Wanted("t", *part_of(shape, rng)) for _ in range(4)]
    times = np.zeros(shape, int)
    for box in boxes:
        times[slices(box)] += 1
    once = [np.all(times[slices((one.offset, one.length))] == 1) for one in wanted]
    assert list(match(index, wanted).uncovered) == np.flatnonzero(np.logical_not(once)).tolist()


@pytest.mark.parametrize("times", [0, 2])
def test_chunks_that_do_not_add_up_to_their_tensor_make_no_index(times: int) -> None:
    parts = [Chunk("t", bytes(5), "uint8", (10,), (5 * n,), (5,)) for n in (0, 1)]
    with pytest.raises(ValueError, match="not as many bytes as the tensor"):
        stored([parts[0], *parts[1:] * times])


def test_a_pinwheel_is_covered_and_a_shifted_one_is_not() -> None:
    """Five rectangles that no straight cut parts: volume alone cannot tell whether they overlap."""
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    rng = random.Random(1)
    tensor = np.zeros((3, 3, 1), np.uint8)
    everything = [Wanted("t", (0, 0), (3, 3))]
    assert match(stored(chunks_of("t", tensor, boxes, 1, rng)), everything).uncovered == ()
    boxes[-1] = ((0, 0), (1, 1))
    assert match(stored(chunks_of("t", tensor, boxes, 1, rng)), everything).uncovered == (0,)


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted("nothing", (0,), (1,)),
        Wanted("w", (), ()),
        Wanted("w", (0, 0), (1, 1)),
        Wanted("w", (8,), (3,)),
        Wanted("w", (11,), (0,)),
        Wanted("w", (0,), (1 << 62,)),
        Wanted("lr", (0,), (1,)),
    ],
)
def test_what_does_not_fit_the_tensor_is_uncovered(wanted: Wanted) -> None:
    index = stored([whole("w", bytes(10)), value("lr", b"0.1")])
    transfers = match(index, [Wanted("w", (2,), (3,)), wanted])
    assert transfers.uncovered == (1,)
    assert transfers.wanted.tolist() == [0]


@pytest.mark.parametrize("wanted", [Wanted("w", (0,), ()), Wanted("w", (-1,), (1,)), Wanted("w", (0,), (-1,))])
def test_what_is_no_rectangle_is_a_mistake_of_the_caller(wanted: Wanted) -> None:
    with pytest.raises(ValueError, match="wanted rectangle"):
        match(stored([whole("w", bytes(10))]), [wanted])


def test_values_and_scalars_are_runs_of_all_their_bytes() -> None:
    index = stored([value("lr", b"0.1  "), Chunk("step", bytes(8), "int64"), whole("empty", b"")])
    transfers = match(index, [Wanted("step", (), ()), Wanted("lr", (), ()), Wanted("empty", (0,), (0,))])
    assert transfers.uncovered == ()
    assert transfers.wanted_nbytes.tolist() == [8, 5, 0]
    assert transfers.direct.tolist() == [True, True]
    assert transfers.nbytes.tolist() == [8, 5]


def test_nothing_wanted_and_nothing_stored() -> None:
    assert len(match(stored([whole("w", bytes(10))]), [])) == 0
    assert match(stored([]), [Wanted("w", (0,), (1,))]).uncovered == (0,)


@pytest.mark.parametrize(
    ("block", "rows"),
    [(64, 8), (48, 8), (64, 62)],
    ids=["whole blocks between", "blocks that end anywhere", "each matrix ends with a block"],
)
def test_a_stack_of_matrices_is_taken_apart_at_its_blocks(block: int, rows: int) -> None:
    """Experts stacked in one tensor, some rows of each wanted: what lies between is not read, or can be shared out."""
    experts = Chunk("w", bytes(4 * 64 * 16), "uint8", (4, 64, 16), (0, 0, 0), (4, 64, 16), block=block)
    transfers = match(stored([experts]), [Wanted("w", (0, 1, 0), (4, rows, 16))])
    assert transfers.chunk_start.tolist() == [16 + expert * 1024 for expert in range(4)]
    assert transfers.nbytes.tolist() == [rows * 16] * 4
    assert transfers.direct.all()


def test_what_blocks_do_not_part_stays_together() -> None:
    experts = Chunk("w", bytes(4 * 64 * 16), "uint8", (4, 64, 16), (0, 0, 0), (4, 64, 16), block=2048)
    assert len(match(stored([experts]), [Wanted("w", (0, 1, 0), (4, 8, 16))])) == 1
