"""The promises of the design, in hundreds of simulated jobs full of trouble; every failure names the seed that replays it."""

from __future__ import annotations

import collections

import pytest

from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.testing.history import (
    INDEX,
    MANIFEST,
    Agreed,
    CameBack,
    Erased,
    Filled,
    Finished,
    GroupLogged,
    Held,
    History,
    LetGo,
    Logged,
    LostPage,
    Matched,
    Piece,
    Promised,
    ReadWhole,
    Returned,
    Settled,
    Whole,
    Wrote,
)
from distckpt.testing.promises import PROMISES, broken_promises
from distckpt.testing.simulator import UNSAFE, Simulation, simulate

pytestmark = pytest.mark.timeout(240)

STORIES = 90
SEARCH = 120
RARE = {
    "ignore_newest": 22,
    "look_before_lease": 19,
    "leases_before_retiring": 57,
    "ignore_group_newest": 313,
    "news_is_nobodys": 255,
}
"""What needs many things to come together is looked for where they do: the seed at which to begin."""


@pytest.fixture(scope="module")
def histories(seed: int) -> list[History]:
    return [simulate(seed + story) for story in range(STORIES)]


def breaches(histories: list[History], name: str) -> list[str]:
    return [f"seed {history.seed}: {breach}" for history in histories for breach in PROMISES[name](history)]


def test_G1_a_committed_checkpoint_has_every_shard_until_it_is_retired(histories):
    assert breaches(histories, "G1") == []


def test_G2_the_log_is_contiguous_with_one_writer_a_number(histories):
    assert breaches(histories, "G2") == []


def test_G3_an_acknowledged_save_is_durable_and_visible(histories):
    assert breaches(histories, "G3") == []


def test_G4_nothing_is_ever_overwritten(histories):
    assert breaches(histories, "G4") == []


def test_G5_no_entry_of_an_older_epoch_follows(histories):
    assert breaches(histories, "G5") == []


def test_G6_no_reader_returns_bytes_of_two_attempts(histories):
    assert breaches(histories, "G6") == []


def test_G7_retention_spares_newest_leased_pinned_and_preserved(histories):
    assert breaches(histories, "G7") == []


def test_G8_the_next_job_loads_and_saves_with_no_repair(histories):
    assert breaches(histories, "G8") == []


def test_G9_in_a_group_a_checkpoint_is_acknowledged_once(histories):
    assert breaches(histories, "G10") == []


def test_G10_who_wants_each_checkpoint_loses_none(histories):
    assert breaches(histories, "G11") == []


def test_the_simulations_are_full_of_what_they_are_about(histories):
    count = collections.Counter[str]()
    for history in histories:
        newest = 0
        for happening in history.happenings:
            count[type(happening).__name__] += 1
            if isinstance(happening, Logged):
                count[happening.entry.kind] += 1
                count["below the newest"] += happening.entry.seq <= newest
                count["landed late"] += not happening.heard
                count["replaced"] += len(happening.entry.state.retiring) > 0
                count["paged"] += happening.pages > 0
                count["preserved"] += len(happening.entry.state.preserved) > 0
                count["pinned"] += any(record.pinned for record in happening.entry.state.active)
                newest = max(newest, happening.entry.seq)
            elif isinstance(happening, GroupLogged):
                count[f"group's {happening.entry.kind}"] += 1
                count["taken over"] += any(claim.delivery > 1 for claim in happening.entry.state.claims)
            elif isinstance(happening, Settled):
                count["settled in vain"] += not happening.counts
    for name, least in {
        "claim": 600, "run": 350, "commit": 1700, "retire": 170, "forget": 600, "pin": 60, "below the newest": 20,
        "landed late": 30, "Promised": 2800, "Held": 1200, "Agreed": 600, "preserved": 300, "pinned": 170, "replaced": 300,
        "group's claim": 1000, "group's ack": 800, "group's reject": 50, "group's release": 50, "group's skip": 5,
        "taken over": 50, "settled in vain": 10, "paged": 550,
    }.items():  # fmt: skip
        assert count[name] >= least * STORIES // 170, (name, count)  # these are of so many stories


def test_the_same_seed_gives_the_same_story():
    assert simulate(7).happenings == simulate(7).happenings
    assert simulate(7).happenings != simulate(8).happenings


@pytest.mark.parametrize(
    ("rule", "promises"),
    [
        ("ignore_newest", {"G2", "G3"}),
        ("overwrite", {"G2", "G4"}),
        ("collect_by_age", {"G1"}),
        ("forget_pages", {"G1"}),
        ("collect_pages", {"G1"}),
        ("restore_unasked", {"G6"}),
        ("no_read_back", {"G8"}),
        ("old_epochs_count", {"G5"}),
        ("look_before_lease", {"G7"}),
        ("leases_before_retiring", {"G7"}),
        ("outlive_lease", {"G6", "G7"}),
        ("wall_clock_leases", {"G6", "G7", "G10"}),
        ("no_group_read_back", {"G10"}),
        ("ignore_group_newest", {"G10"}),
        ("ack_without_token", {"G10"}),
        ("retire_before_groups", {"G11"}),
        ("news_is_nobodys", {"G11"}),
        ("skips_untold", {"G11"}),
    ],
)
def test_breaking_a_rule_breaks_promises(rule, promises):
    assert rule in UNSAFE
    found: dict[str, str] = {}
    first = RARE.get(rule, 0)
    for seed in range(first, first + SEARCH):
        for breach in broken_promises(simulate(seed, [rule])):
            found.setdefault(breach.split()[0], breach)
        if promises <= set(found):
            break
    assert promises <= set(found), f"{rule} was not noticed within {SEARCH} seeds: {found}"
    assert all("(seed " in breach for breach in found.values())


def test_unknown_rules_cannot_be_broken():
    with pytest.raises(ValueError, match="no such rules"):
        Simulation(1, ["gravity"])


# ---- the checks themselves ------------------------------------------------------------------------------------------------


def record(number: int, **more) -> CheckpointRecord:
    attempt = f"e1-{number:08x}{'0' * 24}"
    fields = {"time": 1.0, "world_size": 1, "nbytes": 1, **more}
    return CheckpointRecord(name="ckpt", number=number, attempt=attempt, manifest_size=1, manifest_crc32c=1, **fields)


def logged(seq: int, who: str = "a", epoch: int = 1, kind: str = "commit", heard: bool = True, **state) -> Logged:
    return Logged(who, Entry(1, seq, epoch, kind, 1.0, f"{who}{seq}", State(**{"run": 1, **state})), heard)


def written(one: CheckpointRecord, run: int = 1, order: int | None = None, number: int | None = None) -> list[Wrote]:
    rows = b"\0\0\0\0"
    whole = Whole(one.number, {0: rows}, 1, 1.0)
    piece = Piece(run, one.number if order is None else order, number or one.number, 0, rows, 1)
    return [Wrote(one.attempt, "0", piece), Wrote(one.attempt, INDEX, whole), Wrote(one.attempt, MANIFEST, whole)]


ONE, TWO, THREE = record(1), record(2), record(3)
BOTH = [*written(ONE), *written(TWO)]
START = [*BOTH, logged(1, active=(ONE,)), logged(2, active=(ONE, TWO))]


def broken(*happenings) -> set[str]:
    history = History(5)
    for happening in happenings:
        history.add(happening)
    names = {breach.split()[0] for breach in broken_promises(history)}
    return names - {"G8"} if not any(isinstance(one, CameBack) for one in happenings) else names


def test_an_honest_history_breaks_nothing():
    retiring = logged(3, kind="retire", active=(TWO,), retiring=(ONE,))
    gone = [Erased("a", ONE.attempt, name) for name in (MANIFEST, INDEX, "0")]
    forget = logged(4, kind="forget", active=(TWO,))
    read = [Held("r", TWO.attempt), Returned("r", TWO, {"0": BOTH[3].content}), LetGo("r")]
    run = logged(5, kind="run", active=(TWO,))
    end = [*written(THREE), logged(6, active=(TWO, THREE)), CameBack(TWO, (THREE,))]
    assert broken(*START, Promised("a", 0, TWO), retiring, *gone, forget, *read, run, *end) == set()


@pytest.mark.parametrize(
    ("promise", "happenings"),
    [
        pytest.param("G1", [logged(1, active=(ONE,))], id="committed without objects"),
        pytest.param("G1", [*BOTH[:2], logged(1, active=(ONE,))], id="committed without manifest"),
        pytest.param("G1", [*BOTH[1:3], *written(TWO)[:1], logged(1, active=(ONE,))], id="committed without shard"),
        pytest.param("G1", [*START, Erased("a", TWO.attempt, "0")], id="deleted while active"),
        pytest.param(
            "G1",
            [*written(ONE)[1:], Wrote(ONE.attempt, "0", Piece(1, 1, 1, 0, b"\1\0\0\0", 1)), logged(1, active=(ONE,))],
            id="shard with other chunks",
        ),
        pytest.param("G1", [*START, LostPage("a", "page")], id="page missing"),
        pytest.param("G2", [logged(1), logged(3)], id="gap"),
        pytest.param("G2", [logged(1), logged(2), logged(1, "b"), logged(3, "b")], id="went on below the newest"),
        pytest.param("G2", [logged(1), Logged("b", logged(1).entry, overwrote=True)], id="two writers of a number"),
        pytest.param("G3", [*START, Promised("a", 0, THREE)], id="acknowledged without entry"),
        pytest.param("G3", [*START, logged(3, active=(TWO,))], id="lost without retiring"),
        pytest.param(
            "G3", [*START, logged(3, active=(TWO,), retiring=(ONE,)), logged(4, active=(ONE, TWO))], id="brought back"
        ),
        pytest.param("G4", [*BOTH, Wrote(ONE.attempt, "0", BOTH[0].content, True)], id="shard twice"),
        pytest.param("G5", [logged(1, epoch=2, kind="claim"), logged(2, epoch=1, kind="pin")], id="older epoch follows"),
        pytest.param("G5", [logged(1, kind="claim"), logged(2, "b", kind="pin")], id="two in one epoch"),
        pytest.param("G5", [*BOTH, logged(1, active=(ONE,), run=2)], id="save of an older run"),
        pytest.param("G5", [*BOTH, logged(1, active=(TWO,)), logged(2, active=(TWO, ONE))], id="older save as newest"),
        pytest.param("G6", [*START, Returned("r", TWO, {"0": BOTH[0].content})], id="shard of another attempt"),
        pytest.param("G6", [*START, Returned("r", TWO, {})], id="shards missing"),
        pytest.param("G6", [*written(ONE, number=9), Returned("r", ONE, {"0": written(ONE, number=9)[0].content})], id="number"),
        pytest.param("G6", [Agreed(1, "0", 0, ONE), Agreed(1, "0", 1, TWO)], id="ranks disagree"),
        pytest.param(
            "G6",
            [*START, logged(3, "b", 2, "run", run=2, active=(ONE, TWO)), Matched(1, "0", 0, TWO.attempt),
             Filled(1, "0", 0, TWO.attempt, 1), ReadWhole(1, "0", 0, TWO.attempt), Finished(1, "0", 0, TWO.attempt, 1),
             Agreed(1, "0", 0, TWO)],
            id="restored although superseded",
        ),
        pytest.param("G6", [Matched(1, "0", 0, ONE.attempt), Filled(1, "1", 0, ONE.attempt, 1)], id="matched in another round"),
        pytest.param("G6", [ReadWhole(1, "0", 0, ONE.attempt), Finished(1, "1", 0, ONE.attempt, 1)], id="read in another round"),
        pytest.param("G7", [*START, logged(3, active=(ONE,), retiring=(TWO,))], id="newest retired"),
        pytest.param(
            "G7",
            [*START, Held("r", ONE.attempt), logged(3, active=(TWO,), retiring=(ONE,)), Erased("a", ONE.attempt, "0")],
            id="deleted while leased",
        ),
        pytest.param(
            "G7",
            [*BOTH, logged(1, active=(record(1, pinned=True), TWO)), logged(2, active=(TWO,), retiring=(ONE,))],
            id="pinned retired",
        ),
        pytest.param(
            "G7",
            [*BOTH, logged(1, active=(TWO,), preserved=(ONE,)), logged(2, active=(TWO,), retiring=(ONE,))],
            id="preserved retired",
        ),
        pytest.param("G8", [*START, logged(3, kind="run", active=(ONE, TWO)), CameBack(ONE, (TWO,))], id="older restored"),
        pytest.param("G8", [*START, logged(3, kind="run", active=(ONE, TWO)), CameBack(TWO, (ONE,))], id="save not listed"),
        pytest.param("G8", [*START, logged(3, kind="run"), CameBack(None, (), "stuck")], id="stuck"),
    ],
)  # fmt: skip
def test_each_check_notices_what_it_is_for(promise, happenings):
    assert promise in broken(*happenings)


def test_a_simulation_that_did_not_end_promises_nothing():
    assert [breach.split()[0] for breach in broken_promises(History(3))] == ["G8"]


def test_breaches_name_the_seed():
    history = History(12345)
    history.add(logged(2))
    assert any("seed 12345" in breach for breach in broken_promises(history))
