"""Shards spread over key prefixes of a bucket."""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli.app import main
from distckpt.errors import DamagedError, DataElsewhereError, ObjectNotFoundError
from distckpt.storage import MemoryStore, SpreadStore, Store, mark_of, open_store, place_of
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import Outside
from tests.support.small_runs import Trainer, holds, numbers, run

HEX = "0123456789abcdef"


def digit(path: str) -> str:
    """As docs/FORMAT.md has it."""
    return hashlib.sha256(path.encode()).hexdigest()[0]


class TestSpreadStore(StoreConformance):
    @pytest.fixture
    def places(self) -> dict[str, MemoryStore]:
        return {f"memory://run-{each}/x": MemoryStore() for each in HEX}

    @pytest.fixture
    def store(self, places: dict[str, MemoryStore]) -> Store:
        return SpreadStore("memory://run-{spread}/x", places.__getitem__)

    @pytest.fixture
    def outside(self, places: dict[str, MemoryStore]) -> Outside:
        return _Places(places)


class _Places:
    def __init__(self, places: dict[str, MemoryStore]) -> None:
        self._places = places

    def read(self, path: str) -> bytes | None:
        stored = self._of(path).objects.get(path)
        return stored.data if stored else None

    def write(self, path: str, data: bytes) -> None:
        self._of(path).replace(path, data)

    def _of(self, path: str) -> MemoryStore:
        return self._places[f"memory://run-{digit(path)}/x"]


@pytest.fixture
def place() -> str:
    return f"memory://{uuid.uuid4().hex}/{{spread}}/shards"


def where_shards_are(place: str) -> dict[str, set[str]]:
    found = {each: set(MemoryStore.named(place.replace("{spread}", each)[len("memory://") :]).objects) for each in HEX}
    return {each: paths for each, paths in found.items() if paths}


def test_each_shard_has_the_prefix_of_its_own_name_and_comes_back(tmp_path: Path, place: str) -> None:
    run(tmp_path, *range(1, 9), max_to_keep=6, data=place)
    found = where_shards_are(place)
    assert len(found) > 1
    assert all(digit(path) == each for each, paths in found.items() for path in paths)
    assert len([path for paths in found.values() for path in paths]) == 6
    with distckpt.open(tmp_path, data=place) as reader:
        assert reader.verify().damages == ()
        assert holds(reader.load("state"), 8)
    with Trainer(tmp_path, max_to_keep=1, data=place) as trainer:
        trainer.manager.restore()
        assert holds(trainer.checkpoint.state, 8)
        trainer.saved(9)
    assert numbers(tmp_path) == [9]
    assert len([path for paths in where_shards_are(place).values() for path in paths]) == 1


def test_who_is_told_another_place_is_told_so(tmp_path: Path, place: str) -> None:
    run(tmp_path, 1, data=place)
    (each,) = where_shards_are(place)
    with pytest.raises(DataElsewhereError, match="Give data="):
        distckpt.load(tmp_path, data=place.replace("{spread}", "0" if each != "0" else "1"))
    assert mark_of(open_store(tmp_path, {"data": place})) == hashlib.sha256(place.encode()).hexdigest()[:16]


def test_a_shard_that_is_missing_is_named_by_where_it_should_be(tmp_path: Path, place: str) -> None:
    run(tmp_path, 1, data=place)
    ((each, paths),) = where_shards_are(place).items()
    (path,) = paths
    store = open_store(tmp_path, {"data": place})
    there = f"{place.replace('{spread}', each)}/{path}"
    assert place_of(store, path) == there
    store.delete(path)
    with pytest.raises(ObjectNotFoundError, match=path):
        store.read(path, 1)
    with pytest.raises(DamagedError, match=re.escape(f"{there}, key")):
        distckpt.load(tmp_path, data=place)


@pytest.mark.parametrize(
    ("directory", "data", "told"),
    [
        ("memory://a-{spread}", None, "only shards can be spread"),
        ("memory://a", "s3://bucket-{spread}/run", "stands once below the bucket"),
        ("memory://a", "s3://bucket/{spread}/{spread}", "stands once below the bucket"),
        ("memory://a", "/data/{spread}", "for buckets, and this is a local directory"),
    ],
)
def test_what_cannot_be_spread_is_refused(directory: str, data: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        open_store(directory, {"data": data} if data else {})


def test_commands_take_the_place_as_it_was_given(tmp_path: Path, place: str) -> None:
    run(tmp_path, 1, data=place)
    for command in ("verify", "show"):
        result = CliRunner().invoke(main, [command, str(tmp_path), "--data", place])
        assert (result.exit_code, result.exception) == (0, None), result.output
