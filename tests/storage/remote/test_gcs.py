"""GcsStore against a real server: the conformance kit, whole and in parts, and what only this store does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import distckpt
from distckpt import Checkpoint, CheckpointManager, errors
from distckpt.storage.interface import Store
from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.gcs import GcsStore
from distckpt.storage.remote.http import Endpoint
from distckpt.testing.conformance import StoreConformance
from distckpt.testing.observing import MIB, Outside
from tests.support.servers import Server
from tests.support.stores import GcsBucket


@pytest.fixture
def endpoint(fake_gcs: Server) -> Iterator[Endpoint]:
    endpoint = Endpoint(fake_gcs.url, timeout=10, patience=10)
    yield endpoint
    endpoint.close()


@pytest.fixture
def outside(fake_gcs: Server, bucket: str) -> Outside:
    fake_gcs.make_bucket(bucket)
    return GcsBucket(fake_gcs, bucket, "runs/run-7")


class TestGcsStore(StoreConformance):
    @pytest.fixture
    def store(self, outside: Outside, endpoint: Endpoint, bucket: str) -> Store:
        return GcsStore(endpoint, bucket, "runs/run-7", Budget(8))


class TestGcsStoreInParts(TestGcsStore):
    @pytest.fixture
    def store(self, outside: Outside, endpoint: Endpoint, bucket: str) -> Store:
        return GcsStore(endpoint, bucket, "runs/run-7", Budget(4), part_bytes=MIB)


class TestGcsStoreInTheRoot(TestGcsStore):
    @pytest.fixture
    def outside(self, fake_gcs: Server, bucket: str) -> Outside:
        fake_gcs.make_bucket(bucket)
        return GcsBucket(fake_gcs, bucket, "")

    @pytest.fixture
    def store(self, outside: Outside, endpoint: Endpoint, bucket: str) -> Store:
        return GcsStore(endpoint, bucket, "", Budget(8))


def test_a_manager_saves_restores_and_retires_in_a_bucket(fake_gcs: Server, bucket: str) -> None:
    fake_gcs.make_bucket(bucket)
    directory, options = f"gs://{bucket}/runs/7", {"endpoint_url": fake_gcs.url, "token": "anon", "patience": 20}
    values = {"weight": torch.arange(6 << 20, dtype=torch.float32), "step": 0}
    with CheckpointManager(Checkpoint(state=values), directory, max_to_keep=2, storage_options=options) as manager:
        for number in (1, 2, 3):
            values["weight"] += 1
            values["step"] = number
            assert manager.save(number) == f"{directory}/ckpt-{number}"
    assert distckpt.latest_checkpoint(directory, storage_options=options) == f"{directory}/ckpt-3"
    found = list(distckpt.checkpoints_iterator(directory, timeout=0, storage_options=options))
    assert found == [f"{directory}/ckpt-3"]
    again = {"weight": torch.zeros(6 << 20), "step": -1}
    with CheckpointManager(Checkpoint(state=again), directory, max_to_keep=2, storage_options=options) as manager:
        assert manager.restore_or_initialize() == f"{directory}/ckpt-3"
        assert manager.checkpoints == [f"{directory}/ckpt-2", f"{directory}/ckpt-3"]
    assert again["step"] == 3
    assert torch.equal(again["weight"], values["weight"])
    with pytest.raises(errors.CheckpointNotFoundError):
        distckpt.load(f"{directory}/ckpt-1", storage_options=options)
    assert not [name for name in GcsBucket(fake_gcs, bucket, "runs/7").names() if name.startswith((".parts", "ckpt-1"))]
