"""The training of train.py as a Ray Train job; workers that die are replaced, and training goes on where it was saved.

    python examples/train_on_ray.py --workers 2 --directory runs/gpt-on-ray

On a cluster (cluster-configs/gcp.yaml) the directory must be storage that all machines share.
"""

from __future__ import annotations

import argparse
import os

import ray.train
import ray.train.torch
import torch
from train import Options, train


def train_on_worker(config: dict[str, object]) -> None:
    """What every worker runs. Ray Train has made the process group; distckpt finds its rank there."""
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    train(Options(**config))  # type: ignore[arg-type] # the options went through a plain dict


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="how many ranks")
    parser.add_argument("--directory", required=True, help="where checkpoints are, shared by all machines")
    parser.add_argument("--steps", type=int, default=Options.steps, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=Options.save_every, help="steps between two checkpoints")
    parser.add_argument("--gpu", action="store_true", help="give every worker a GPU")
    parser.add_argument("--failures", type=int, default=3, help="how often dead workers are replaced")
    return parser.parse_args()


def main() -> None:
    """Start the job on the cluster that is there, else on this machine."""
    given = parse()
    directory = given.directory if "://" in given.directory else os.path.abspath(given.directory)
    trainer = ray.train.torch.TorchTrainer(
        train_on_worker,
        train_loop_config={"directory": directory, "steps": given.steps, "save_every": given.save_every},
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=ray.train.RunConfig(
            storage_path=f"{directory}-ray-train",  # Ray Train's own notes on the job
            failure_config=ray.train.FailureConfig(max_failures=given.failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
