"""Two Ray Train workers that save through distckpt."""

from __future__ import annotations

import sys

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tests.test_launchers import train_on_ray


def main(directory: str, results: str) -> None:
    """Run the workers on the cluster that RAY_ADDRESS names."""
    ray.init(log_to_driver=True)
    trainer = TorchTrainer(
        train_on_ray,
        train_loop_config={"directory": directory},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=results),
    )
    trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
