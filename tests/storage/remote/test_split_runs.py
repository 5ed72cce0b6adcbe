"""Log and manifests in one real store, shards in another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt.errors import StoreUnsuitableError
from distckpt.storage import SplitStore, open_store
from tests.support.gang import Gang
from tests.support.proxy import Answer, Proxy, like
from tests.support.s3_bucket import Bucket, options_for
from tests.support.servers import Server
from tests.support.small_runs import Trainer, holds, run
from tests.support.stores import GcsBucket

ZONAL = b'{"locationType": "zone", "storageClass": "RAPID"}'


def gcs(url: str) -> dict[str, Any]:
    return {"endpoint_url": url, "token": "anon", "patience": 20}


def assert_run_goes_on(directory: str, keywords: Mapping[str, Any]) -> None:
    run(directory, 1, 2, 3, max_to_keep=2, **keywords)
    with Trainer(directory, max_to_keep=2, **keywords) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-3"
        assert holds(trainer.checkpoint.state, 3)
        trainer.saved(4)
        trainer.manager.wait()
        assert trainer.manager.checkpoints == [f"{directory}/ckpt-3", f"{directory}/ckpt-4"]
    with distckpt.open(directory, **keywords) as reader:
        assert reader.verify().damages == ()
        assert holds(reader.load("state"), 4)


def test_a_log_in_gcs_and_shards_in_s3(fake_gcs: Server, moto: Server, bucket: str, tmp_path: Path) -> None:
    fake_gcs.make_bucket(bucket)
    moto.make_bucket(bucket)
    data = {"data": f"s3://{bucket}/shards", "data_options": options_for(moto.url), "cache_dir": tmp_path}
    assert_run_goes_on(f"gs://{bucket}/run", {"storage_options": gcs(fake_gcs.url), **data})
    shards = Bucket(moto, bucket, "shards").names()
    assert {name.split("/")[1] for name in shards} == {"ckpt-3", "ckpt-4"}
    assert len(shards) == 2
    assert not [name for name in GcsBucket(fake_gcs, bucket, "run").names() if name.endswith("-0.arrow")]


def test_shards_in_s3_that_are_spread_over_prefixes(moto: Server, bucket: str, tmp_path: Path) -> None:
    moto.make_bucket(bucket)
    data = {"data": f"s3://{bucket}/{{spread}}/run", "data_options": options_for(moto.url), "cache_dir": tmp_path}
    assert_run_goes_on(str(tmp_path / "run"), data)
    names = Bucket(moto, bucket, "").names()
    assert {name.split("/", 2)[2].split("/")[0] for name in names} == {"ckpt-3", "ckpt-4"}
    assert {name.split("/")[0] for name in names} == {
        hashlib.sha256(name.split("/", 2)[2].encode()).hexdigest()[0] for name in names
    }


def test_what_a_killed_writer_left_below_any_prefix_is_found_and_swept(moto: Server, bucket: str) -> None:
    moto.make_bucket(bucket)
    client = Bucket(moto, bucket, "")
    store = open_store(
        "memory://spread-uploads", {"data": f"s3://{bucket}/{{spread}}/run", "data_options": options_for(moto.url)}
    )
    paths = [f"ckpt-{number}/e1-{number:032x}/00000-0.arrow" for number in range(6)]
    for path in paths:
        digit = hashlib.sha256(path.encode()).hexdigest()[0]
        client.client.create_multipart_upload(Bucket=bucket, Key=f"{digit}/run/{path}")
    assert isinstance(store, SplitStore)
    hidden = list(store.hidden(""))
    assert sorted(info.path for info in hidden) == paths
    assert store.sweep(hidden) == 6
    assert client.uploads() == []


def test_two_ranks_and_their_coordinator_put_shards_apart(
    fake_gcs: Server, moto: Server, bucket: str, gang2: Gang
) -> None:
    fake_gcs.make_bucket(bucket)
    moto.make_bucket(bucket)
    directory = f"gs://{bucket}/run"
    data = {"data": f"s3://{bucket}/shards", "data_options": options_for(moto.url)}
    arguments = {"directory": directory, "storage_options": gcs(fake_gcs.url), "data": data}
    found = gang2.run("ranks.apart:saved_and_restored", **arguments)
    for rank, said in enumerate(found):
        assert (said["path"], said["weight"], said["here"]) == (f"{directory}/ckpt-3", rank + 3.0, 2)
        assert "Give data=" in said["told"]
    names = Bucket(moto, bucket, "shards").names()
    assert {name.rpartition("/")[2] for name in names} == {"00000-0.arrow", "00001-0.arrow"}
    assert {name.split("/")[1] for name in names} == {"ckpt-3"}


def test_a_zonal_bucket_takes_shards_and_no_log(fake_gcs: Server, bucket: str, tmp_path: Path) -> None:
    fake_gcs.make_bucket(bucket)
    with Proxy(fake_gcs.port) as proxy:
        proxy.fail(Answer(200, ZONAL), when=like("GET", f"/b/{bucket}?"), times=100)
        directory, options = f"gs://{bucket}/run", gcs(proxy.url)
        with pytest.raises(StoreUnsuitableError, match="by data="):
            run(directory, 1, storage_options=options)
        assert_run_goes_on(str(tmp_path / "run"), {"data": directory, "data_options": options})
        assert len(GcsBucket(fake_gcs, bucket, "run").names()) == 2
