"""A Ray Train job with a session: DDP over two workers, one of which is killed once, with SIGKILL, in its fifth step."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

import distckpt
from distckpt.integrations.ray_train import training_session

STEPS = 8


def train(config: dict[str, str]) -> None:
    """What each worker runs."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    model = ray.train.torch.prepare_model(module) if config["workers"] == "2" else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)

    def step() -> None:
        number = session.global_step
        with Path(config["seen"], str(rank)).open("a") as seen:
            seen.write(f"{number}\n")
        killed = Path(config["seen"], "killed")
        if rank == 1 and number == 4 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(2, 4, generator=generator)).pow(2).mean().backward()
        optimizer.step()

    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    with training_session(checkpoint, config["directory"], save_steps=2, save_timeout=30) as session:
        while session.global_step < STEPS and not session.should_stop():
            session.run(step)
            session.report({"rank": rank})
            if rank == 0 and session.global_step == STEPS - 1:
                session.request_stop()


class Reports(ray.train.UserCallback):
    """Writes what the workers report, a line each time."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Path(self.path).open("a") as reports:
            reports.write(json.dumps(metrics) + "\n")


def main(directory: str, results: str, seen: str) -> None:
    """Run the job on the cluster that RAY_ADDRESS names."""
    ray.init(log_to_driver=True)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"directory": directory, "seen": seen, "workers": "2"},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            storage_path=results,
            failure_config=ray.train.FailureConfig(max_failures=1),
            callbacks=[Reports(f"{seen}/reports")],
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
