"""Damage of every kind to every file: told with file and key, never returned as data, and passed over by a resume."""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import msgspec
import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.directory.log import sequence_numbers
from distckpt.errors import CheckpointNotFoundError, DamagedError, NoGoodCheckpointError, UnsupportedFormatError
from distckpt.format import names
from distckpt.format.json.log import Entry
from distckpt.format.json.manifest import Manifest, ShardRecord
from distckpt.format.json.sealed import seal, unseal
from distckpt.storage import LocalStore
from tests.support.checkpoints import write_checkpoint
from tests.support.damage import copied, flip
from tests.support.forging import forge_index, manifest_of
from tests.support.part import Part
from tests.support.small_runs import Trainer, assert_loads, attempt_folder, holds, numbers, run, target, tree

KEYS = ("state.weights", "state.half", "state.nested.count", "state.nested.names", "state.nested.step")


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with one rank has left: ckpt-1 and ckpt-2."""
    directory = tmp_path_factory.mktemp("one")
    run(directory, 1, 2)
    return directory


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with two ranks has left: ckpt-1 and ckpt-2."""
    directory = tmp_path_factory.mktemp("two")
    for number in (1, 2):
        write_checkpoint(directory, number, {"state": tree(number)}, ranks=2)
    return directory


@pytest.fixture(params=["of_one_rank", "of_two_ranks"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with ckpt-1 and ckpt-2, to be damaged."""
    return copied(request.getfixturevalue(request.param), tmp_path)


def cut(file: Path, keep: float = 0.5) -> None:
    """Keep the first part of a file."""
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def shard_of(directory: Path, number: int = 2) -> Path:
    """The last rank's first shard."""
    return max(attempt_folder(directory, number).glob("*-0.arrow"))


def payload(directory: Path, key: str) -> tuple[Path, int]:
    """The shard of ckpt-2 with the first chunk of ``key``, and where in it that begins."""
    from distckpt.directory.locate import locate, read_index

    index = read_index(locate(directory / "ckpt-2"))
    row = int(index.rows(key)[0])
    file = names.shard_name(int(index.rank[row]), int(index.shard[row]))
    return attempt_folder(directory, 2) / file, int(index.position[row])


def exchange(one: Path, other: Path) -> None:
    """Each gets the content of the other."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def verify(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of ``distckpt verify``, and all damage that it tells."""
    result = CliRunner().invoke(main, ["verify", "--json", str(path)])
    found = json.loads(result.stdout) if result.stdout else []
    return result.exit_code, [damage for report in found for damage in report["damages"]]


# ---- each kind of damage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harm:
    """``do`` harms ckpt-2 of a directory; ``file`` is what errors name; ``keyed``: a key can be known."""

    name: str
    do: Callable[[Path], object]
    file: str
    keyed: bool = False

    def __str__(self) -> str:
        return self.name


def _flip_payload(directory: Path) -> None:
    flip(*payload(directory, "state.weights"))


def _from_first(name: str) -> Callable[[Path], None]:
    def swap(directory: Path) -> None:
        one, other = attempt_folder(directory, 1), attempt_folder(directory, 2)
        shutil.copyfile(next(one.glob(name)), next(other.glob(name)))

    return swap


def _in_attempt(name: str, do: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda directory: do(attempt_folder(directory, 2) / name)


HARMS = [
    Harm("shard cut in half", lambda directory: cut(shard_of(directory)), ".arrow", True),
    Harm("shard emptied", lambda directory: cut(shard_of(directory), 0), ".arrow", True),
    Harm("shard missing", lambda directory: shard_of(directory).unlink(), ".arrow", True),
    Harm("shard flipped", _flip_payload, ".arrow", True),
    Harm("shard of the other checkpoint", _from_first("00000-0.arrow"), ".arrow", True),
    *[
        harm
        for name in (names.INDEX, names.MANIFEST)
        for harm in (
            Harm(f"{name} cut in half", _in_attempt(name, cut), name),
            Harm(f"{name} emptied", _in_attempt(name, lambda file: cut(file, 0)), name),
            Harm(f"{name} missing", _in_attempt(name, Path.unlink), name),
            Harm(f"{name} flipped", _in_attempt(name, lambda file: flip(file, 100)), name),
            Harm(f"{name} of the other checkpoint", _from_first(name), name),
        )
    ],
]


def assert_told(directory: Path, harm: Harm, caplog: pytest.LogCaptureFixture) -> None:
    """Every reader says what is wrong; a run falls back to ckpt-1, says why, and goes on."""
    path = directory / "ckpt-2"
    readings = [lambda: distckpt.load(path), lambda: target().restore(path), lambda: distckpt.load(directory)]
    if (
        harm.name == "manifest.json missing"
    ):  # as it is when somebody has deleted the newest: the next one is the newest
        del readings[2]
        with caplog.at_level(logging.WARNING):
            assert holds(distckpt.load(directory, "state"), 1)
        assert f"{path}: in the log, but deleted from storage" in caplog.text
    for read in readings:
        with pytest.raises(DamagedError) as caught:
            read()
        assert caught.value.path.startswith(f"{path}/")
        assert caught.value.path.endswith(harm.file)
        assert caught.value.reason
        assert (caught.value.key in KEYS) if harm.keyed else caught.value.key is None
    status, damages = verify(directory)
    assert status == 1
    assert any(damage["path"].endswith(harm.file) for damage in damages)
    assert not harm.keyed or "missing" in harm.name or {damage["key"] for damage in damages} & set(KEYS)
    with caplog.at_level(logging.WARNING), Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-1"
        assert holds(trainer.checkpoint.state, 1)
        refusals = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
        assert any("ckpt-2" in text and harm.file in text for text in refusals), caplog.text
        trainer.saved(3)
    assert_loads(directory / "ckpt-3", 3)
    assert_loads(directory / "ckpt-1", 1)


@pytest.mark.parametrize("harm", HARMS, ids=str)
def test_damage_is_told_and_passed_over(directory: Path, harm: Harm, caplog: pytest.LogCaptureFixture) -> None:
    harm.do(directory)
    assert_told(directory, harm, caplog)


def test_shards_of_two_ranks_swapped(of_two_ranks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = copied(of_two_ranks, tmp_path)
    folder = attempt_folder(directory, 2)
    exchange(folder / "00000-0.arrow", folder / "00001-0.arrow")
    assert_told(directory, Harm("swapped", exchange, ".arrow", keyed=True), caplog)


@pytest.mark.parametrize("key", KEYS)
def test_the_key_that_is_hurt_is_the_one_that_is_named(of_one_rank: Path, tmp_path: Path, key: str) -> None:
    directory = copied(of_one_rank, tmp_path)
    file, position = payload(directory, key)
    flip(file, position)
    with pytest.raises(DamagedError) as caught:
        distckpt.load(directory / "ckpt-2")
    assert (caught.value.path, caught.value.key) == (str(file), key)
    assert str(file) in str(caught.value)
    assert key in str(caught.value)
    status, damages = verify(directory / "ckpt-2")
    assert status == 1
    assert (str(file), key) in {(damage["path"], damage["key"]) for damage in damages}
    others = [other for other in KEYS if other != key]
    with distckpt.open(directory / "ckpt-2") as reader:
        assert set(reader.load(others)) == set(others)


def test_all_checkpoints_damaged(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    for number in (1, 2):
        shard_of(directory, number).unlink()
    made = []
    with Trainer(directory, init_fn=lambda: made.append(1)) as trainer:
        with pytest.raises(NoGoodCheckpointError, match=r"ckpt-2.*missing.*ckpt-1.*missing") as caught:
            trainer.manager.restore_or_initialize()
        assert [path for path, _ in caught.value.refused] == [f"{directory}/ckpt-2", f"{directory}/ckpt-1"]
        assert made == []
        trainer.saved(3)
    assert_loads(directory / "ckpt-3", 3)


# ---- the log, and the file that is derived from it --------------------------------------------------------------------


def newest_entry(directory: Path) -> Path:
    """The file of the newest log entry."""
    return directory / names.entry_path(sequence_numbers(LocalStore(directory))[-1])


def entry_before(entry: Path) -> Path:
    """The file of the entry before that."""
    return entry.with_name(f"{int(entry.stem) - 1:020d}.json")


def _of_another_number(directory: Path) -> None:
    newest = newest_entry(directory)
    shutil.copyfile(entry_before(newest), newest)


@pytest.mark.parametrize(
    "harm",
    [
        lambda directory: cut(newest_entry(directory)),
        lambda directory: cut(newest_entry(directory), 0),
        lambda directory: flip(newest_entry(directory), 60),
        _of_another_number,
    ],
    ids=["cut in half", "emptied", "flipped", "of another number"],
)
def test_a_damaged_newest_log_entry(
    of_one_rank: Path, tmp_path: Path, harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    directory = copied(of_one_rank, tmp_path)
    file = newest_entry(directory)
    harm(directory)
    with caplog.at_level(logging.WARNING):
        assert holds(distckpt.load(directory)["state"], numbers(directory)[-1])
    assert file.name in caplog.text
    status, damages = verify(directory)
    assert status == 1
    assert any(damage["path"].endswith(file.name) for damage in damages)
    with Trainer(directory) as trainer:
        newest = trainer.manager.restore_or_initialize()
        assert newest == f"{directory}/ckpt-2", "its manifest is whole, so it is rolled forward"
        assert holds(trainer.checkpoint.state, 2)
        trainer.saved(3)
    assert numbers(directory) == [1, 2, 3]
    for number in (1, 2, 3):
        assert_loads(directory / f"ckpt-{number}", number)


def test_two_log_entries_swapped(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    newest = newest_entry(directory)
    exchange(newest, entry_before(newest))
    assert verify(directory)[0] != 0
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-2"
        trainer.saved(3)
    assert numbers(directory) == [1, 2, 3]


@pytest.mark.parametrize("name", ["00000-0.arrow", names.INDEX, names.MANIFEST])
def test_files_of_two_checkpoints_swapped(of_one_rank: Path, tmp_path: Path, name: str) -> None:
    directory = copied(of_one_rank, tmp_path)
    exchange(*(attempt_folder(directory, number) / name for number in (1, 2)))
    for number in (1, 2):
        with pytest.raises(DamagedError, match=name):
            distckpt.load(directory / f"ckpt-{number}")
    with Trainer(directory) as trainer:
        with pytest.raises(NoGoodCheckpointError, match=rf"ckpt-2.*{name}.*ckpt-1.*{name}"):
            trainer.manager.restore_or_initialize()
        trainer.saved(3)
    assert_loads(directory / "ckpt-3", 3)


def test_a_missing_newest_log_entry(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    newest_entry(directory).unlink()
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-2"
        trainer.saved(3)
    assert numbers(directory) == [1, 2, 3]


def test_a_log_of_which_nothing_can_be_read(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    for file in (directory / names.LOG).iterdir():
        flip(file, 40)
    before = sorted(path for path in directory.rglob("*") if path.is_file())
    with pytest.raises(DamagedError, match="_log"):
        distckpt.load(directory)
    with pytest.raises(DamagedError, match="_log"):
        Trainer(directory)
    assert verify(directory)[0] == 1
    assert set(before) <= set(directory.rglob("*")), "what cannot be understood must not be deleted"
    shutil.rmtree(directory / names.LOG)
    assert_loads(directory / "ckpt-2", 2)  # each opens as if it had been copied alone


@pytest.mark.parametrize("harm", [cut, lambda file: cut(file, 0), lambda file: flip(file, 3), Path.unlink])
def test_nothing_depends_on_the_checkpoint_file(
    of_one_rank: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    directory = copied(of_one_rank, tmp_path)
    harm(directory / "checkpoint")
    assert distckpt.latest_checkpoint(directory) == f"{directory}/ckpt-2"
    assert holds(distckpt.load(directory)["state"], 2)
    assert verify(directory)[0] == 0
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-2"
        trainer.saved(3)
    state = distckpt.get_checkpoint_state(directory)
    assert state is not None
    assert state.model_checkpoint_path == f"{directory}/ckpt-3"


# ---- every byte -------------------------------------------------------------------------------------------------------


def positions(file: Path, dice: random.Random, part: Part) -> Iterator[int]:
    """A part of a text's, some of the others'."""
    size = file.stat().st_size
    return iter(part.of(range(size), 3) if size < 1024 else sorted(dice.sample(range(size), 90)))


@pytest.mark.timeout(120)
def test_a_flipped_bit_anywhere_is_found_or_does_not_matter(
    of_one_rank: Path, tmp_path: Path, seed: int, part: Part
) -> None:
    dice = random.Random(seed)
    directory = copied(of_one_rank, tmp_path)
    path = directory / "ckpt-2"
    told, harmless = 0, 0
    found = sorted(attempt_folder(directory, 2).iterdir())
    for file in (*found, newest_entry(directory), directory / "checkpoint"):
        content = file.read_bytes()
        for position in positions(file, dice, part):
            flip(file, position, dice.randrange(8))
            try:
                assert holds(distckpt.load(path)["state"], 2), f"{file} at {position}"
                harmless += 1
            except (DamagedError, CheckpointNotFoundError):
                told += 1
            file.write_bytes(content)
    assert told > 170
    assert harmless > 30  # what is not read needs no check


def test_a_flipped_bit_in_a_copy_without_log(of_one_rank: Path, tmp_path: Path, part: Part) -> None:
    path = Path(shutil.copytree(of_one_rank / "ckpt-2", tmp_path / "alone"))
    file = next(path.glob(f"*/{names.MANIFEST}"))
    content = file.read_bytes()
    for position in part.of(range(len(content)), 3):
        flip(file, position, position % 8)
        with pytest.raises((DamagedError, CheckpointNotFoundError)):
            distckpt.load(path)
        file.write_bytes(content)
    assert holds(distckpt.load(path)["state"], 2)


# ---- files that were made to do harm ------------------------------------------------------------------------------------


@pytest.fixture
def alone(of_one_rank: Path, tmp_path: Path) -> Path:
    """A copy of ckpt-2 without its log: whoever forges its manifest has nothing else to forge."""
    (tmp_path / "outside.txt").write_text("not to be read")
    return Path(shutil.copytree(of_one_rank / "ckpt-2", tmp_path / "ckpt-2"))


def sealed_text(text: str) -> bytes:
    """Any JSON object's text with a seal that is right."""
    body = text.rstrip()[:-1].encode()
    return body + b',"crc32c":"%08x"}\n' % crc32c.crc32c(body)


FORGERIES: dict[str, dict[str, Any]] = {
    "climbing name": {"name": "../../outside"},
    "absolute name": {"name": "/etc/passwd"},
    "name with a slash": {"name": "a/b"},
    "name that hides": {"name": ".hidden"},
    "name with a NUL": {"name": "ckpt\0"},
    "climbing attempt": {"attempt": "../../../outside"},
    "absolute attempt": {"attempt": "/etc"},
    "another attempt": {"attempt": "e1-" + "0" * 32},
    "world of 10**12": {"world_size": 10**12},
    "world of none": {"world_size": 0},
    "number below zero": {"number": -1},
    "number of 40 digits": {"number": 10**40},
    "index of 2**62 bytes": {"index_size": 2**62},
    "index of less than nothing": {"index_size": -1},
    "shard of 2**62 bytes": {"shards": [{"rank": 0, "shard": 0, "size": 2**62, "crc32c": 0}]},
    "shard of rank 7 of 1": {"shards": [{"rank": 7, "shard": 0, "size": 10, "crc32c": 0}]},
    "shard below zero": {"shards": [{"rank": 0, "shard": -1, "size": 10, "crc32c": 0}]},
    "the same shard a thousand times": {"shards": [{"rank": 0, "shard": 0, "size": 10, "crc32c": 0}] * 1000},
    "shards that add up to 2**80": {
        "world_size": 1 << 20,
        "shards": [{"rank": rank, "shard": 0, "size": 1 << 60, "crc32c": 0} for rank in range(1 << 10)],
    },
    "many shards of nothing": {
        "world_size": 1 << 16,
        "shards": [{"rank": 0, "shard": shard, "size": 0, "crc32c": 0} for shard in range(1 << 16)][::-1],
    },
    "no shards at all": {"shards": []},
    "a path of its own": {"path": "../../outside.txt"},
    "deep nesting": {"shards": json.loads("[" * 500 + "]" * 500)},
    "text for a number": {"world_size": "1"},
    "no time": {"time": None},
}


@pytest.mark.parametrize("fields", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(alone: Path, fields: dict[str, Any]) -> None:
    file, manifest = manifest_of(alone)
    file.write_bytes(sealed_text(json.dumps({**msgspec.to_builtins(manifest), **fields}, separators=(",", ":"))))
    began = time.monotonic()
    for read in (distckpt.load, target().restore):
        with pytest.raises(DamagedError) as caught:
            read(alone)
        assert caught.value.path.startswith(f"{alone}/")
        assert len(str(caught.value)) < 2000
    assert verify(alone)[0] == 1
    assert time.monotonic() - began < 20


def test_a_manifest_that_is_sound_but_not_the_one_in_the_log(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    file = attempt_folder(directory, 2) / names.MANIFEST
    manifest = unseal(file.read_bytes(), Manifest, str(file), 1 << 20)
    file.write_bytes(seal(msgspec.structs.replace(manifest, time=manifest.time + 1)))
    with pytest.raises(DamagedError, match="not what the log says"):
        distckpt.load(directory / "ckpt-2")
    assert verify(directory)[0] == 1
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-1"


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, '{"format":1,"a":' * 200_000, '{"format":1,"name":"' + "x" * 30_000_000], ids=len
)
def test_a_manifest_that_is_only_there_to_be_parsed(alone: Path, text: str) -> None:
    manifest_of(alone)[0].write_text(text)
    began = time.monotonic()
    with pytest.raises(DamagedError):
        distckpt.load(alone)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("version", [2, 0, "1", None, 10**30])
def test_an_unknown_format_version_is_named(alone: Path, version: object) -> None:
    file, manifest = manifest_of(alone)
    file.write_bytes(sealed_text(json.dumps({**msgspec.to_builtins(manifest), "format": version})))
    with pytest.raises(UnsupportedFormatError, match="format version"):
        distckpt.load(alone)


def test_a_newer_log_is_named_and_left_alone(of_one_rank: Path, tmp_path: Path) -> None:
    directory = copied(of_one_rank, tmp_path)
    newest = newest_entry(directory)
    entry = msgspec.to_builtins(unseal(newest.read_bytes(), Entry, "", 1 << 20))
    for file in (directory / names.LOG).iterdir():
        file.write_bytes(sealed_text(json.dumps({**entry, "format": 2, "new": "field"})))
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UnsupportedFormatError, match="format version 2"):
        distckpt.load(directory)
    with pytest.raises(UnsupportedFormatError, match="format version 2"):
        Trainer(directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_newer_entry_on_top_of_older_ones_is_not_passed_over(of_one_rank: Path, tmp_path: Path) -> None:
    """Two releases on one directory: the older one must not go back to what it can read, and commit on top of that."""
    directory = copied(of_one_rank, tmp_path)
    newest = newest_entry(directory)
    entry = msgspec.to_builtins(unseal(newest.read_bytes(), Entry, "", 1 << 20))
    newer = newest.with_name(f"{int(newest.stem) + 1:020d}.json")
    newer.write_bytes(sealed_text(json.dumps({**entry, "format": 2, "seq": int(newer.stem)})))
    with pytest.raises(UnsupportedFormatError, match="format version 2"):
        distckpt.load(directory)
    with pytest.raises(UnsupportedFormatError, match="format version 2"):
        Trainer(directory)


@pytest.mark.parametrize("field", ["name", "attempt"])
@pytest.mark.parametrize("text", ["../../outside", "/etc", "..", "a/../../b"])
def test_a_forged_log_entry_leads_nowhere(of_one_rank: Path, tmp_path: Path, field: str, text: str) -> None:
    directory = copied(of_one_rank, tmp_path)
    victim = tmp_path / "outside"
    victim.mkdir()
    (victim / "manifest.json").write_text("precious")
    newest = newest_entry(directory)
    entry = msgspec.to_builtins(unseal(newest.read_bytes(), Entry, "", 1 << 20))
    forged = {**entry["state"]["active"][0], field: text}
    entry["state"] = {**entry["state"], "retiring": [forged]}
    newest.write_bytes(sealed_text(json.dumps(entry)))
    run(directory, 3, 4, max_to_keep=1)
    assert (victim / "manifest.json").read_text() == "precious"
    assert numbers(directory) == [4]


def test_links_and_pipes_in_the_place_of_files(of_one_rank: Path, tmp_path: Path) -> None:
    import os

    outside = tmp_path / "outside"
    directory = copied(of_one_rank, tmp_path)
    shard = shard_of(directory)
    shutil.copy(shard, outside)
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(distckpt.errors.DistckptError, match="symbolic link"):
        distckpt.load(directory / "ckpt-2")
    assert verify(directory)[0] == 1
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(distckpt.errors.DistckptError):
        distckpt.load(directory / "ckpt-2")
    assert verify(directory)[0] == 1
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-1"


# ---- a forged index, with a manifest that fits it -------------------------------------------------------------------------


def _row(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(row for row in rows if row["key"] == key)


def _huge(rows: list[dict[str, Any]]) -> None:
    row = _row(rows, "state.weights")
    row["shape"] = [1 << 45, 3]  # of which only a corner is covered


def _hole(rows: list[dict[str, Any]]) -> None:
    rows[:] = [{**row, "shape": [6, 3]} if row["key"] == "state.weights" else row for row in rows]


def _elsewhere(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["position"] = 1 << 50


def _other_rank(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["rank"] = 5


def _other_bytes(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["position"] -= 8


def _pickled_dtype(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["dtype"] = "pickle"


def _not_json(rows: list[dict[str, Any]]) -> None:
    row = _row(rows, "state.weights")
    row.update(dtype="json", shape=[], offset=[], length=[])


def _climbing_path(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["path"] = '["state",{"rank":-1}]'


def _deep_path(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["path"] = "[" * 2000 + "]" * 2000


def _two_trees(rows: list[dict[str, Any]]) -> None:
    _row(rows, "state.weights")["path"] = '["state"]'


@pytest.mark.parametrize(
    "change",
    [
        _huge,
        _hole,
        _elsewhere,
        _other_rank,
        _other_bytes,
        _pickled_dtype,
        _not_json,
        _climbing_path,
        _deep_path,
        _two_trees,
    ],
)
def test_a_forged_index_is_refused(alone: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    forge_index(alone, change)
    began = time.monotonic()
    with pytest.raises(DamagedError):
        distckpt.load(alone)
    with pytest.raises((DamagedError, distckpt.errors.MismatchError)):
        target().restore(alone)
    assert time.monotonic() - began < 20


def test_forging_by_itself_changes_nothing(alone: Path) -> None:
    forge_index(alone, lambda rows: None)
    assert holds(distckpt.load(alone)["state"], 2)
    assert verify(alone) == (0, [])


def test_a_fine_manifest_with_shards_that_are_not_there(alone: Path) -> None:
    file, manifest = manifest_of(alone)
    more = (*manifest.shards, ShardRecord(rank=0, shard=9, size=10, crc32c=0))
    file.write_bytes(seal(msgspec.structs.replace(manifest, shards=more)))
    status, damages = verify(alone)
    assert status == 1
    assert any(damage["path"].endswith("00000-9.arrow") for damage in damages)
