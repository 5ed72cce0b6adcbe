"""A directory in S3, from one end to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import StoreUnsuitableError
from distckpt.testing.observing import MIB
from tests.support.proxy import Proxy, Reset, Seen
from tests.support.s3_bucket import Bucket, options_for
from tests.support.servers import Server
from tests.support.small_runs import Trainer, holds, run

Options = Mapping[str, Any]


def assert_loads(path: str, number: int, options: Options) -> None:
    with distckpt.open(path, options) as reader:
        assert reader.verify().damages == ()
        assert holds(reader.load("state"), number), path


@pytest.mark.wide(2)
@pytest.mark.parametrize("server", ["moto", "seaweedfs"])
def test_a_run_is_saved_kept_and_resumed(server: str, bucket: str, request: pytest.FixtureRequest) -> None:
    found: Server = request.getfixturevalue(server)
    found.make_bucket(bucket)
    directory, options = f"s3://{bucket}/runs/7", options_for(found.url)
    run(directory, 1, 2, 3, max_to_keep=2, storage_options=options)
    with Trainer(directory, max_to_keep=2, storage_options=options) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-3"
        assert holds(trainer.checkpoint.state, 3)
        trainer.saved(4)
        trainer.manager.wait()
        assert trainer.manager.checkpoints == [f"{directory}/ckpt-3", f"{directory}/ckpt-4"]
    assert_loads(f"{directory}/ckpt-4", 4, options)
    assert list(distckpt.checkpoints_iterator(directory, timeout=0, storage_options=options)) == [f"{directory}/ckpt-4"]
    assert distckpt.latest_checkpoint(directory, storage_options=options) == f"{directory}/ckpt-4"


class Numbers:
    """An input that goes on where it was."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_shards_in_several_parts_come_back_bit_for_bit(moto: Server, bucket: str) -> None:
    moto.make_bucket(bucket)
    directory, options = f"s3://{bucket}/run", options_for(moto.url)
    generator = torch.Generator().manual_seed(1)
    weights, numbers = torch.randn(3 * MIB + 5, generator=generator), Numbers()
    numbers.position = 17
    saved = distckpt.Checkpoint(weights=weights, input=distckpt.PerRank(numbers, on_resize="drop"))
    with distckpt.CheckpointManager(saved, directory, storage_options=options) as manager:
        pending = manager.save(1)
        assert pending is not None
        path = pending.result(60)
    (shard,) = [key for key in Bucket(moto, bucket, "run").names() if key.endswith("0.arrow") and "index" not in key]
    head = Bucket(moto, bucket, "run").client.head_object(Bucket=bucket, Key=shard)
    assert head["ETag"].endswith('-3"')
    other, again = torch.zeros_like(weights), Numbers()
    checkpoint = distckpt.Checkpoint(weights=other, input=distckpt.PerRank(again, on_resize="drop"))
    checkpoint.restore(path, storage_options=options)
    assert torch.equal(other, weights)
    assert again.position == 17


def test_a_save_is_committed_whatever_answer_gets_lost(moto: Server, bucket: str) -> None:
    moto.make_bucket(bucket)
    directory = f"s3://{bucket}/run"
    with Proxy(moto.port) as proxy:
        options = options_for(proxy.url)
        with Trainer(directory, storage_options=options) as trainer:
            trainer.saved(1)
            for number in range(4):  # a shard, an index, a manifest and an entry of the log
                proxy.fail(Reset(applied=True), when=nth_write(number))
                trainer.saved(2 + number)
                assert proxy.planned == 0
                assert_loads(f"{directory}/ckpt-{2 + number}", 2 + number, options)


def is_write(seen: Seen) -> bool:
    return seen.method in ("PUT", "POST")


def nth_write(number: int) -> Any:
    left = iter([False] * number + [True])
    return lambda seen: is_write(seen) and next(left, False)


def test_a_directory_on_a_server_that_ignores_conditions_is_refused(rclone: Server, bucket: str) -> None:
    rclone.make_bucket(bucket)
    with pytest.raises(StoreUnsuitableError):
        run(f"s3://{bucket}/run", 1, storage_options=options_for(rclone.url))
