"""Pages are a way to put a state down: with all of them opened it is what it would have been without."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import DamagedError
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.paging import Records, Sizes, next_page, opened, ref_of, sealed_page, small_pages, turned
from distckpt.format.json.sealed import seal, unseal

SIZES = Sizes(newest=2, page=3, most=9, together=3)


def record(made: int, order: int | None = None, epoch: int = 1) -> CheckpointRecord:
    return CheckpointRecord(
        name="ckpt", number=made, attempt=f"e{epoch}-{made:08x}{'0' * 24}", manifest_size=1, manifest_crc32c=1,
        time=100.0 + made, world_size=1, nbytes=1, order=made if order is None else order,
    )  # fmt: skip


def paged(state: State, sizes: Sizes = SIZES) -> tuple[State, dict[str, Records]]:
    """The state with all that may go into pages in pages, and those."""
    pages: dict[str, Records] = {}
    while (found := next_page(state, sizes, active=True)) is not None:
        page = f"e9-{len(pages):032x}"
        pages[page] = found[1]
        state = turned(state, ref_of(page, *found, size=1, crc=1), found[1])
    return state, pages


PLACES = st.lists(st.integers(0, 200), unique=True, max_size=40)


@given(active=PLACES, preserved=PLACES, legacy=st.integers(0, 40), at=st.data())
def test_whatever_goes_into_pages_comes_back_to_its_place(active, preserved, legacy, at):
    """Of logs that did not count commits all orders are 0; what people copied may be in any order."""
    mine = at.draw(st.one_of(st.just(sorted(active)), st.just(active)))
    state = State(
        active=tuple(record(made, 0 if n < legacy else made) for n, made in enumerate(mine)),
        preserved=tuple(record(1000 + made) for made in preserved),
    )
    left, pages = paged(state)
    assert left.active[-1:] == state.active[-1:]
    some = at.draw(st.sets(st.sampled_from(sorted(pages)))) if pages else set()
    whole = opened(opened(left, {page: pages[page] for page in some}), pages)
    assert whole.active == state.active
    assert {one.attempt for one in whole.preserved} == {one.attempt for one in state.preserved}
    assert whole.pages == ()
    assert opened(left, pages).active == state.active


@given(count=st.integers(1, 300), at=st.data())
def test_an_entry_lists_few_however_many_are_kept(count, at):
    state, pages = State(), dict[str, Records]()
    for made in range(1, count + 1):
        small = small_pages(state, SIZES, active=True)
        state = opened(state, {page.id: pages[page.id] for page in small})
        state = msgspec.structs.replace(state, active=(*state.active, record(made)))
        if (found := next_page(state, SIZES, active=True)) is not None:
            page = f"e9-{made:032x}"
            pages[page] = found[1]
            state = turned(state, ref_of(page, *found, size=1, crc=1), found[1])
        assert len(state.active) < SIZES.newest + SIZES.page
    assert len(state.pages) <= count // SIZES.most + SIZES.together
    assert [one.number for one in opened(state, pages).active] == list(range(1, count + 1))


def test_what_is_younger_than_the_last_active_one_stays_at_hand():
    state = State(active=(record(5), record(50)), preserved=tuple(record(made) for made in range(40, 60) if made != 50))
    left, pages = paged(state)
    assert pages
    assert all(one.number < 50 for records in pages.values() for one in records)
    assert {one.number for one in left.preserved} >= set(range(51, 60))


def test_a_reference_tells_what_may_be_in_its_page():
    ref = ref_of("e1-" + "a" * 32, "active", (record(5), record(9)), 10, 11)
    assert [ref.may_have_number(number) for number in (4, 5, 7, 9, 10)] == [False, True, True, True, False]
    assert [ref.may_have_attempt(record(made).attempt) for made in (4, 5, 7, 9, 10)] == [False, True, True, True, False]
    assert not ref.may_have_attempt("nonsense")


def test_a_record_of_a_page_is_no_younger_than_its_reference_says():
    ref = msgspec.structs.replace(
        ref_of("e1-" + "a" * 32, "active", (record(5), record(9)), 1, 1), times=(100.0, 106.0)
    )
    assert [one.time for one in opened(State(pages=(ref,)), {ref.id: (record(5), record(9))}).active] == [105.0, 106.0]


def test_what_a_page_says_too_late_gives_way_to_what_is_at_hand():
    """It could not be read when its number was saved again, or when one of its attempts was let go."""
    ref = ref_of("e1-" + "a" * 32, "active", (record(5), record(6), record(7)), 1, 1)
    again = msgspec.structs.replace(record(5, 50, epoch=2), attempt=record(5, epoch=2).attempt)
    state = State(active=(again,), retiring=(record(6),), pages=(ref,))
    whole = opened(state, {ref.id: (record(5), record(6), record(7))})
    assert whole.active == (record(7), again)
    assert whole.preserved == (record(5),)
    assert list(whole.doubles()) == []


def entry(state: State, seq: int = 1) -> Entry:
    return Entry(1, seq, 1, "commit", 1.0, f"c{seq}", state)


def test_entries_with_pages_are_sealed_as_they_are_read():
    sealer, state = EntrySealer(), State()
    for made in range(1, 60):
        state = msgspec.structs.replace(state, active=(*state.active, record(made)), commits=made)
        state, _ = paged(state)
        state = msgspec.structs.replace(
            state,
            pages=tuple(msgspec.structs.replace(page, id=f"e{at}-{made:032x}") for at, page in enumerate(state.pages)),
        )
        assert unseal(sealer.seal(entry(state, made)), Entry, "log", 1 << 20) == entry(state, made)
    assert sealer.seal(entry(state, 60)) == seal(entry(state, 60))
    assert b"pages" not in EntrySealer().seal(entry(State(active=(record(1),))))


REF = ref_of("e1-" + "a" * 32, "active", (record(5), record(9)), 10, 11)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "../x"}, {"count": 0}, {"size": 0}, {"size": 1 << 40}, {"crc32c": -1}, {"numbers": (9, 5)}, {"orders": (-1, 5)},
        {"times": (2.0, 1.0)}, {"attempts": ("x", "y")}, {"attempts": REF.attempts[::-1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_reference_that_makes_no_sense_is_damage_and_is_not_written(fields):
    bad = entry(State(pages=(msgspec.structs.replace(REF, **fields),)))
    with pytest.raises(ValueError, match="stored"):
        EntrySealer().seal(bad)
    with pytest.raises(ValueError, match="stored"):
        seal(bad)


def test_a_page_is_referred_to_once():
    with pytest.raises(ValueError, match="refers to a page twice"):
        EntrySealer().seal(entry(State(pages=(REF, REF))))
    with pytest.raises(ValueError, match="an attempt twice"):
        sealed_page(REF.id, (record(5), record(5)))
    with pytest.raises(DamagedError, match="CRC32C"):
        unseal(sealed_page(REF.id, (record(5),)).replace(b'"number":5', b'"number":6'), Entry, "page", 1 << 20)
