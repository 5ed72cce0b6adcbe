"""Manifest and log entry on storage: what was sealed comes back, and nothing else ever does."""

from __future__ import annotations

import json
import re
from typing import Any

import crc32c
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import DamagedError, UnsupportedFormatError
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.export import ExportedFile, ExportedModule, ExportManifest
from distckpt.format.json.lease import Lease
from distckpt.format.json.left_out import LeftOut
from distckpt.format.json.log import CheckpointRecord, Entry, Kind, State
from distckpt.format.json.manifest import Manifest, ShardRecord
from distckpt.format.json.sealed import Sealed, seal, unseal
from tests.support.sealed import ATTEMPT, ENTRY, MANIFEST, OLDER, RECORD, plain, resealed

PATH = "run/ckpt-42/manifest.json"


@pytest.mark.parametrize("record", [MANIFEST, ENTRY])
def test_what_is_sealed_comes_back(record: Sealed) -> None:
    data = seal(record)
    assert unseal(data, type(record), PATH, len(data)) == record


def test_it_is_json_with_the_checksum_last() -> None:
    data = seal(MANIFEST)
    members = json.loads(data)
    head, _, _ = data.rpartition(b',"crc32c"')
    assert list(members)[-1] == "crc32c"
    assert members["crc32c"] == f"{crc32c.crc32c(head):08x}"
    assert data.endswith(b'"}\n')
    assert resealed(plain(MANIFEST)) == data


@given(
    st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    st.text(),
    st.integers(min_value=0, max_value=10**18 - 1),
)
def test_any_text_and_number_survives(metrics: dict[str, float], token: str, number: int) -> None:
    record = msgspec.structs.replace(RECORD, metrics=metrics, number=number)
    entry = msgspec.structs.replace(ENTRY, state=State(active=(record,), run_token=token))
    assert unseal(seal(entry), Entry, PATH, 1 << 20) == entry


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_would_not_come_back_is_refused_before_it_is_written(number: float) -> None:
    entry = with_record(metrics={"loss": number})
    with pytest.raises(ValueError, match="Entry cannot be stored"):
        seal(entry)
    with pytest.raises(ValueError, match="cannot be stored: time or a metric of checkpoint ckpt-42 is not a number"):
        EntrySealer().seal(entry)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
def test_every_flipped_byte_is_found(flip: int) -> None:
    data = bytearray(seal(ENTRY))
    for position in range(len(data)):
        data[position] ^= flip
        with pytest.raises(DamagedError, match=r"^run/ckpt-42/manifest\.json: ."):
            unseal(bytes(data), Entry, PATH, 1 << 20)
        data[position] ^= flip


def test_every_cut_is_found() -> None:
    data = seal(MANIFEST)
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            unseal(data[:length], Manifest, PATH, 1 << 20)


@pytest.mark.parametrize("more", [b"\n", b" ", b"\0" * 512, b"{}"])
def test_nothing_may_follow(more: bytes) -> None:
    with pytest.raises(DamagedError):
        unseal(seal(MANIFEST) + more, Manifest, PATH, 1 << 20)


def test_a_file_of_zeros_says_that_its_end_is_missing() -> None:
    with pytest.raises(DamagedError, match="cut short"):
        unseal(bytes(4096), Manifest, PATH, 1 << 20)


@pytest.mark.parametrize("newer", [resealed({"format": 7, "other": [1]}), b'{"format":7,"sealed":"otherwise"}'])
def test_a_newer_format_is_named_whatever_else_is_in_it(newer: bytes) -> None:
    with pytest.raises(UnsupportedFormatError, match="format version 7, and this release reads version 1"):
        unseal(newer, Manifest, PATH, 1 << 20)


def test_a_version_that_is_only_a_flipped_bit_says_that_it_may_be_one() -> None:
    with pytest.raises(UnsupportedFormatError, match="damaged: CRC32C is"):
        unseal(seal(MANIFEST).replace(b'"format":1', b'"format":3'), Manifest, PATH, 1 << 20)


def test_the_size_is_capped_before_anything_is_decoded() -> None:
    data = seal(MANIFEST)
    with pytest.raises(DamagedError, match="is the most that is read"):
        unseal(data, Manifest, PATH, len(data) - 1)


def changed(record: msgspec.Struct, **fields: object) -> bytes:
    return resealed({**plain(record), **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"world_size": "2"},
        {"world_size": 2.0},
        {"world_size": True},
        {"world_size": None},
        {"time": "1"},
        {"shards": {}},
        {"shards": [[0, 0, 10, 1]]},
        {"name": 5},
        {"path": "../../etc/passwd"},
    ],
)
def test_types_are_not_coerced_and_unknown_fields_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DamagedError, match="not a Manifest"):
        unseal(changed(MANIFEST, **fields), Manifest, PATH, 1 << 20)


def test_a_missing_field_is_damage() -> None:
    members = plain(MANIFEST)
    del members["attempt"]
    with pytest.raises(DamagedError, match="attempt"):
        unseal(resealed(members), Manifest, PATH, 1 << 20)


def test_a_sound_manifest_and_entry_pass_the_checks() -> None:
    empty = msgspec.structs.replace(ENTRY, kind="claim", state=State())
    assert [list(record.problems()) for record in (MANIFEST, ENTRY, empty)] == [[], [], []]


def assert_makes_no_sense(record: Sealed, reason: str) -> None:
    """No reader takes it, so it is not written either."""
    assert any(re.search(reason, problem) for problem in record.problems())
    with pytest.raises(ValueError, match="cannot be stored"):
        seal(record)
    with pytest.raises(DamagedError) as caught:
        unseal(resealed(plain(record)), type(record), PATH, 1 << 20)
    assert caught.value.path == PATH


SHARD = MANIFEST.shards[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "../up"}, "not a checkpoint name"),
        ({"name": ""}, "not a checkpoint name"),
        ({"attempt": "e3-xyz"}, "not an attempt id"),
        ({"attempt": "../" + ATTEMPT}, "not an attempt id"),
        ({"world_size": 0}, "world size 0"),
        ({"world_size": (1 << 20) + 1}, "world size"),
        ({"world_size": 1}, "cannot be in a world of 1"),
        ({"number": -1}, "out of bounds"),
        ({"number": 10**18}, "out of bounds"),
        ({"epoch": -1}, "out of bounds"),
        ({"format": 2}, "format version 2"),
        ({"time": float("inf")}, "time"),
        ({"index_size": -1}, "index size"),
        ({"index_size": 1 << 40}, "index size"),
        ({"index_crc32c": 1 << 32}, "index size"),
        ({"shards": (SHARD, SHARD)}, "listed twice or out of order"),
        ({"shards": MANIFEST.shards[::-1]}, "listed twice or out of order"),
        ({"left_out": LeftOut(exclude=("",))}, "is no key that could have been left out"),
        ({"left_out": LeftOut(keys=("w",))}, "does not say so"),
        ({"shards": (ShardRecord(-1, 0, 1, 1),)}, "cannot be in a world"),
        ({"shards": (ShardRecord(0, -1, 1, 1),)}, "cannot be in a world"),
        ({"shards": (ShardRecord(0, 1 << 40, 1, 1),)}, "cannot be in a world"),
        ({"shards": (ShardRecord(0, 0, -1, 1),)}, "out of bounds"),
        ({"shards": (ShardRecord(0, 0, 10**30, 1),)}, "out of bounds"),
        ({"shards": (ShardRecord(0, 0, 1, -1),)}, "out of bounds"),
        ({"shards": (ShardRecord(0, 0, 1 << 60, 1), ShardRecord(0, 1, 1 << 60, 1))}, "more bytes than can exist"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_damage(fields: dict[str, Any], reason: str) -> None:
    assert_makes_no_sense(msgspec.structs.replace(MANIFEST, **fields), reason)


def with_record(**fields: Any) -> Entry:
    record = msgspec.structs.replace(RECORD, **fields)
    return msgspec.structs.replace(ENTRY, state=State(active=(record,)))


def with_state(**fields: Any) -> Entry:
    return msgspec.structs.replace(ENTRY, state=msgspec.structs.replace(ENTRY.state, **fields))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (msgspec.structs.replace(ENTRY, seq=-1), "seq -1"),
        (msgspec.structs.replace(ENTRY, epoch=10**18), "epoch"),
        (msgspec.structs.replace(ENTRY, format=2), "format version 2"),
        (msgspec.structs.replace(ENTRY, time=float("nan")), "time"),
        (msgspec.structs.replace(ENTRY, commit_id=""), "commit id"),
        (msgspec.structs.replace(ENTRY, commit_id="x" * 257), "commit id"),
        (with_state(run=-1), "run -1"),
        (with_state(run_token="x" * 257), "run token"),
        (with_state(last_preserved_timestamp=float("inf")), "time"),
        (with_state(active=(RECORD, RECORD)), "lists an attempt twice"),
        (with_state(retiring=(OLDER, OLDER), active=()), "lists an attempt twice"),
        (with_state(active=(RECORD, msgspec.structs.replace(OLDER, number=42))), "same name and number"),
        (with_state(active=(RECORD,), retiring=(RECORD,)), "both as alive and as being deleted"),
        (with_state(active=(), preserved=(RECORD,), retiring=(RECORD,)), "both as alive and as being deleted"),
        (with_record(name="a/b"), "not a checkpoint name"),
        (with_record(attempt=ATTEMPT.upper()), "not an attempt id"),
        (with_record(number=-1), "the number of"),
        (with_record(manifest_size=1 << 40), "manifest size"),
        (with_record(manifest_crc32c=-1), "manifest size"),
        (with_record(world_size=0), "world size"),
        (with_record(nbytes=-1), "bytes"),
        (with_record(time=float("-inf")), "time"),
        (with_record(metrics={"loss": float("nan")}), "metric"),
    ],
)
def test_an_entry_that_makes_no_sense_is_damage(entry: Entry, reason: str) -> None:
    assert_makes_no_sense(entry, reason)
    with pytest.raises(ValueError, match="cannot be stored"):
        EntrySealer().seal(entry)


# ---- entries one after the other ------------------------------------------------------------------------------------


RECORDS = st.builds(
    lambda number, time, pinned, metrics: msgspec.structs.replace(
        RECORD, number=number, attempt=f"e1-{number:032x}", time=time, pinned=pinned, metrics=metrics
    ),
    st.integers(0, 12),
    st.floats(0, 1e12),
    st.booleans(),
    st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)
STATES = st.lists(st.tuples(RECORDS, st.sampled_from(["active", "preserved", "retiring"])), max_size=8)


@given(st.lists(STATES, max_size=5), st.text(max_size=9))
def test_an_entry_after_others_has_the_bytes_that_it_has_alone(states: list[Any], token: str) -> None:
    sealer = EntrySealer()
    for seq, records in enumerate(states, 1):
        once = {record.attempt: (record, where) for record, where in records}.values()
        lists = {name: tuple(record for record, where in once if where == name) for _, name in once}
        entry = Entry(1, seq, 1, "commit", 1.5, f"c{seq}", State(run_token=token, **lists))
        data = sealer.seal(entry)
        assert data == EntrySealer().seal(entry)
        assert unseal(data, Entry, PATH, len(data)) == entry


def test_an_entry_after_others_is_refused_like_any_other() -> None:
    sealer = EntrySealer()
    sealer.seal(ENTRY)
    with pytest.raises(ValueError, match="an attempt twice"):
        sealer.seal(with_state(active=(*ENTRY.state.active, RECORD)))
    with pytest.raises(ValueError, match="run token"):
        sealer.seal(with_state(run_token="x" * 257))
    with pytest.raises(ValueError, match="not a number"):
        sealer.seal(with_state(active=(*ENTRY.state.active[:1], msgspec.structs.replace(RECORD, time=float("nan")))))
    assert sealer.seal(ENTRY) == EntrySealer().seal(ENTRY)
    assert unseal(sealer.seal(ENTRY), Entry, PATH, 1 << 20) == unseal(seal(ENTRY), Entry, PATH, 1 << 20)


def long_record(number: int, nbytes: int) -> CheckpointRecord:
    """One of about so many bytes in the log."""
    metrics = {f"{at:x<1000000}": 1.0 for at in range(nbytes // 1_000_010)}
    return msgspec.structs.replace(RECORD, number=number, attempt=f"e1-{number:032x}", metrics=metrics)


def kept(kind: Kind, *mib: int, retiring: int = 0) -> Entry:
    """An entry with records of about so many MiB each."""
    active = tuple(long_record(number, size << 20) for number, size in enumerate(mib))
    gone = (long_record(100, retiring << 20),) if retiring else ()
    return Entry(1, 1, 1, kind, 1.5, "c", State(active=active, retiring=gone))


def test_an_entry_that_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"lists 2 checkpoints would be .* too long to be read\. Keep fewer"):
        EntrySealer().seal(kept("claim", 33, 33))
    with pytest.raises(ValueError, match="is the most that is read"):
        seal(kept("claim", 33, 33))


def test_a_commit_leaves_room_for_what_has_to_follow_it() -> None:
    """A claim, a run, and the records on their way out: whoever keeps fewer from now on can commit."""
    with pytest.raises(ValueError, match="Keep fewer"):
        EntrySealer().seal(kept("commit", 33, 25))
    assert EntrySealer().seal(kept("claim", 33, 25))
    assert EntrySealer().seal(kept("commit", 33, 20))
    assert EntrySealer().seal(kept("commit", 33, retiring=25))
    with pytest.raises(ValueError, match="Keep fewer"):
        EntrySealer().seal(kept("commit", 33, retiring=32))
    assert EntrySealer().seal(kept("retire", 33, retiring=32))


def test_nothing_else_that_no_reader_would_take_is_written_either() -> None:
    with pytest.raises(ValueError, match=r"this Lease cannot be stored: .* is the most that is read"):
        seal(Lease(2, ATTEMPT, "h" * (64 << 10), 1.0))
    many = tuple(ShardRecord(rank, 0, 1 << 40, 1 << 31) for rank in range(1 << 20))
    with pytest.raises(ValueError, match=r"this Manifest cannot be stored: .* is the most that is read"):
        seal(msgspec.structs.replace(MANIFEST, world_size=1 << 20, shards=many))
    file = ExportedFile("model.safetensors", 1, 2)
    modules = tuple(ExportedModule(f"{number:x<120}", (file,)) for number in range(90_000))
    with pytest.raises(ValueError, match=r"this ExportManifest cannot be stored: .* is the most that is read"):
        seal(ExportManifest(1, "a" * 32, ATTEMPT, 1.0, modules))
