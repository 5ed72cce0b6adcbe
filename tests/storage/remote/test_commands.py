"""The commands that copy, clean up and examine, on real object stores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import crc32c
import pytest
import torch
from click.testing import CliRunner, Result

import distckpt
from distckpt import Checkpoint, CheckpointManager
from distckpt.cli import main
from distckpt.errors import AlreadyExistsError, ObjectNotFoundError
from distckpt.storage import Store, SupportsCopying, SupportsHidden, examine, open_store
from distckpt.testing.observing import MIB, pattern, sections_of
from distckpt.transfer.carrier import Carrier, Freight, Way
from tests.support.proxy import Answer, Fault, Proxy, Reset, like
from tests.support.s3_bucket import Bucket, options_for
from tests.support.servers import Server
from tests.support.stores import GcsBucket


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(*arguments: str | Path) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def flags(options: dict[str, Any], flag: str = "-o") -> list[str]:
    return [text for key, value in options.items() for text in (flag, f"{key}={value}")]


@pytest.fixture
def gs(fake_gcs: Server, bucket: str) -> tuple[str, dict[str, Any]]:
    """A bucket of a GCS, and how to get there."""
    fake_gcs.make_bucket(bucket)
    return f"gs://{bucket}", {"endpoint_url": fake_gcs.url, "token": "anon", "patience": 20}


@pytest.fixture
def s3(moto: Server, bucket: str) -> tuple[str, dict[str, Any]]:
    """A bucket of an S3, likewise."""
    moto.make_bucket(bucket)
    return f"s3://{bucket}", dict(options_for(moto.url))


Place = tuple[str, dict[str, Any]]


def test_checkpoints_travel_from_store_to_store_and_within_one_the_server_copies(
    gs: Place, s3: Place, tmp_path: Path
) -> None:
    """With shards that go in one request and in parts. What arrives at the end is what began, byte for byte."""
    values = {"large": torch.arange(5 << 20, dtype=torch.float32), "small": torch.ones(3)}
    with CheckpointManager(Checkpoint(state=values), tmp_path / "begin") as manager:
        manager.save(1)
        values["large"] = values["large"][:1000].clone()
        manager.save(2)
    way: list[Place] = [(str(tmp_path / "begin"), {}), (f"{gs[0]}/a", gs[1]), (f"{gs[0]}/b", gs[1])]
    way += [(f"{s3[0]}/c", s3[1]), (f"{s3[0]}/d", s3[1]), (str(tmp_path / "end"), {})]
    for source, target in itertools.pairwise(way):
        done = as_json("cp", source[0], target[0], *flags(source[1]), *flags(target[1], "--to-option"))
        assert [one["fate"] for one in done["checkpoints"]] == ["copied", "copied"], (source, target)
        by_server = source[0].split("/")[0] == target[0].split("/")[0] != ""
        assert all(one["by_server"] == (one["nbytes"] if by_server else 0) for one in done["checkpoints"])
        again = as_json("cp", source[0], target[0], *flags(source[1]), *flags(target[1], "--to-option"))
        assert [one["fate"] for one in again["checkpoints"]] == ["there already"] * 2
    ends = [{path.name: path.read_bytes() for path in (tmp_path / end).glob("ckpt-*/*/*")} for end in ("begin", "end")]
    assert ends[0] == ends[1]
    loaded = distckpt.load(way[4][0], storage_options=way[4][1])
    assert torch.equal(loaded["state"]["large"], values["large"])


@pytest.fixture(params=["gs", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def store(place: Place) -> Store:
    return open_store(f"{place[0]}/run", place[1])


def test_what_is_copied_by_the_server_is_checked_and_never_over_another(place: Place, store: Store) -> None:
    data = pattern(3 * MIB + 5)
    there = open_store(f"{place[0]}/other run+é", place[1])
    there.put_unique("ckpt-1/0.arrow", len(data), sections_of(data, MIB))
    assert isinstance(store, SupportsCopying)
    info = store.copy(there, "ckpt-1/0.arrow", "ckpt-2/0.arrow", len(data))
    assert info is not None
    assert (info.path, info.size) == ("ckpt-2/0.arrow", len(data))
    assert store.read("ckpt-2/0.arrow", len(data)) == data
    store.replace("ckpt-3/0.arrow", b"other")
    with pytest.raises(AlreadyExistsError):
        store.copy(there, "ckpt-1/0.arrow", "ckpt-3/0.arrow", len(data))
    assert store.read("ckpt-3/0.arrow", 10) == b"other"
    with pytest.raises(ObjectNotFoundError):
        store.copy(there, "ckpt-1/1.arrow", "ckpt-4/0.arrow", len(data))
    elsewhere = open_store(f"memory://{place[0][5:]}")
    assert store.copy(elsewhere, "ckpt-1/0.arrow", "ckpt-5/0.arrow", 1) is None


def test_google_is_asked_again_until_a_long_copy_is_done(gs: Place, fake_gcs: Server, bucket: str) -> None:
    with Proxy(fake_gcs.port) as proxy:
        there, store = (open_store(f"{gs[0]}/{run}", {**gs[1], "endpoint_url": proxy.url}) for run in ("a", "b"))
        assert isinstance(store, SupportsCopying)
        there.put_if_absent("shard", b"content")
        proxy.fail(Answer(200, b'{"done": false, "rewriteToken": "go on"}'), when=like("POST", "rewriteTo"), times=2)
        info = store.copy(there, "shard", "shard", 7)
        assert info is not None
        assert (info.crc32c, proxy.planned) == (crc32c.crc32c(b"content"), 0)
        assert [seen for seen in map(str, proxy.seen) if "rewriteToken=go" in seen]


@pytest.mark.parametrize("fault", [Reset(applied=True), Answer(503), Answer(412, applied=True), Answer(501)], ids=repr)
def test_whatever_becomes_of_the_servers_copy_what_is_wanted_is_there_in_the_end(
    gs: Place, fake_gcs: Server, bucket: str, fault: Fault
) -> None:
    with Proxy(fake_gcs.port) as proxy:
        there, store = (open_store(f"{gs[0]}/{run}", {**gs[1], "endpoint_url": proxy.url}) for run in ("a", "b"))
        there.put_if_absent("shard", b"content")
        proxy.fail(fault, when=like("POST", "rewriteTo"))
        carrier = Carrier(there, store)
        way = carrier.carry(Freight("shard", "shard", 7, crc32c.crc32c(b"content")))
        carrier.close()
        assert store.read("shard", 7) == b"content"
        assert way is (Way.HERE if fault == Answer(501) else Way.SERVER)


def test_interrupted_uploads_are_shown_with_size_and_deleted(
    gs: Place, s3: Place, fake_gcs: Server, moto: Server, bucket: str
) -> None:
    parts = GcsBucket(fake_gcs, bucket, "run")
    for number in range(2):
        parts.write(f".parts/dead-0{number}", bytes(1000))
    uploads = Bucket(moto, bucket, "run")
    key = {"Bucket": bucket, "Key": "run/ckpt-1/e1/0.arrow"}
    upload = uploads.client.create_multipart_upload(**key)["UploadId"]
    uploads.client.upload_part(**key, UploadId=upload, PartNumber=1, Body=bytes(2000))
    for (url, options), path in ((gs, ".parts/dead"), (s3, "ckpt-1/e1/0.arrow")):
        arguments = [f"{url}/run", *flags(options), "--older-than", "0", "--force"]
        store = open_store(f"{url}/run", options)
        assert isinstance(store, SupportsHidden)
        assert [info.path for info in store.hidden("")] == [path]
        assert list(store.hidden("ckpt-1")) == []
        shown = as_json("gc", f"{url}/run", *flags(options))
        assert (shown["garbage"], [one["path"] for one in shown["unsure"]]) == ([], [path])
        shown = as_json("gc", *arguments, "--dry-run")["garbage"]
        assert [(one["path"], one["kind"], one["nbytes"]) for one in shown] == [(path, "interrupted write", 2000)]
        assert call("gc", *arguments).exit_code == 0
        assert list(store.hidden("")) == []
    assert (parts.names(), uploads.uploads()) == (set(), [])


def test_the_doctor_finds_a_bucket_safe_and_leaves_nothing_there(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "MOST_BYTES", examine.FIRST_BYTES)
    found = as_json("doctor", f"{place[0]}/run", *flags(place[1]))
    assert {one["verdict"] for one in found["findings"]} == {"good"}
    assert found["save_seconds"] > 0
    assert "the store keeps CRC32C itself; readers compare ours" in {one["found"] for one in found["findings"]}
    root = open_store(place[0], place[1])
    assert [*root.folders(""), *root.list("")] == []


def test_the_doctor_says_that_a_server_lies_which_ignores_conditions(rclone: Server, bucket: str) -> None:
    rclone.make_bucket(bucket)
    result = call("doctor", f"s3://{bucket}/run", *flags(dict(options_for(rclone.url))))
    assert result.exit_code == 1
    assert f"Checkpoints would NOT be safe at s3://{bucket}/run" in result.stdout


def test_the_doctor_cannot_try_a_bucket_that_is_not_there(place: Place) -> None:
    result = call("doctor", f"{place[0]}-nowhere/run", *flags({**place[1], "patience": 1}))
    assert result.exit_code == 2
    assert "could not be tried" in result.stdout
