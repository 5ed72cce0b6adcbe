"""A Ray Train job with a session: DDP over two workers, one of which is killed once, with SIGKILL, in its fifth step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

import distckpt
from distckpt.integrations.ray_train import path_of, training_session
from tests.support.process import belongings, changes

STEPS = 8


def make_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    """A step on data that is the same for all workers, so that any number of them comes to the same result."""

    def step(number: int) -> None:
        optimizer.zero_grad()
        data = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        module(data).pow(2).mean().backward()
        optimizer.step()

    return step


def make_module() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same on every worker."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def train(config: dict[str, str]) -> None:
    """What each worker runs."""
    rank, notes = ray.train.get_context().get_world_rank(), Path(config["notes"])
    module, optimizer = make_module()
    model = ray.train.torch.prepare_model(module)
    step = make_step(model, optimizer)

    def dangerous_step() -> None:
        number = session.global_step
        with (notes / f"rank-{rank}").open("a") as seen:
            seen.write(f"{number}\n")
        if rank == 1 and number == 4 and not (notes / "killed").exists():
            (notes / "killed").touch()
            while distckpt.latest_checkpoint(config["directory"]) != f"{config['directory']}/ckpt-4":
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        step(number)

    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    before = belongings()
    with training_session(checkpoint, config["directory"], save_steps=2, save_timeout=30) as session:
        while session.global_step < STEPS and not session.should_stop():
            session.run(dangerous_step)
            if session.global_step % 2 == 0:  # the report of the step before the death may be lost with it
                session.report({"rank": rank, "loss": float(session.global_step)})
        with (notes / "changed").open("a") as changed:  # now that saves have waited until Ray was joined
            changed.write("".join(f"{change}\n" for change in changes(before, belongings())))


class Reports(ray.train.UserCallback):
    """Writes what the workers report, a line each time."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Path(self.path).open("a") as reports:
            reports.write(json.dumps(metrics) + "\n")


def main(directory: str, results: str, notes: str) -> None:
    """Run the job on the cluster that RAY_ADDRESS names."""
    ray.init(log_to_driver=True)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"directory": directory, "notes": notes},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            storage_path=results,
            failure_config=ray.train.FailureConfig(max_failures=1),
            checkpoint_config=ray.train.CheckpointConfig(
                checkpoint_score_attribute="loss", checkpoint_score_order="min"
            ),
            callbacks=[Reports(f"{notes}/reports")],
        ),
    )
    result = trainer.fit()
    found = {
        "newest": path_of(result.checkpoint, directory),
        "best": path_of(result.get_best_checkpoint("loss", "min"), directory),
        "metrics": result.metrics,
    }
    Path(notes, "result").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
