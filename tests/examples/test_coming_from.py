"""Both programs of each page for those who come from another tool: killed and resumed, with the same losses throughout."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt
from tests.ranks.integrations import Texts, digest, language_model
from tests.support.crashing import Crashing, Say
from tests.support.snippets import play

Program = Callable[..., None]
"""Plays program ``number`` of a page in a folder, says ``["step", number, loss]`` after each step, and ends at ``stop``."""


class Stopped(Exception):
    """Training was made to fail."""


def stop_if(step: int, stop: int | None, kill: bool) -> None:
    """At the beginning of a step."""
    if step == stop and kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == stop:
        raise Stopped


# ---- torch.save -----------------------------------------------------------------------------------------------------


def of_pytorch(say: Say, folder: str, number: int, stop: int | None, kill: bool) -> None:
    """A loop of one's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)

    def train_step(step: int) -> None:
        stop_if(step, stop, kill)
        optimizer.zero_grad()
        loss = model(torch.full((3, 4), float(step))).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        say(["step", step, loss.item()])

    names = {"os": os, "torch": torch, "distckpt": distckpt, "model": model, "optimizer": optimizer}
    names |= {"scheduler": scheduler, "steps": 25, "train_step": train_step}
    page = (partial(play, "docs/coming-from-pytorch.md", 0), partial(play, "docs/coming-from-pytorch.md", 1))
    page[number](names, Path(folder))
    say(["end", digest(model)])


# ---- Transformers ---------------------------------------------------------------------------------------------------


def of_transformers(say: Say, folder: str, number: int, stop: int | None, kill: bool) -> None:
    """A Trainer, which ends with the best model."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watching(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            stop_if(state.global_step, stop, kill)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in logs:
                say(["step", state.global_step, logs["loss"]])

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            say(["save", state.global_step])

    def trainer_of(*arguments: Any, callbacks: Any = (), **more: Any) -> Any:
        return Trainer(*arguments, callbacks=[*callbacks, Watching()], **more)

    settings = partial(
        TrainingArguments, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, eval_steps=2, max_steps=10,
        learning_rate=1e-2,
    )  # fmt: skip
    model = language_model(0.1)
    names = {"os": os, "Trainer": trainer_of, "TrainingArguments": settings, "model": model}
    names |= {"data": Texts(30), "held_out": Texts(5)}
    page = (partial(play, "docs/coming-from-transformers.md", 0), partial(play, "docs/coming-from-transformers.md", 1))
    found = page[number](names, Path(folder), {"save_steps=100": "save_steps=2"})
    best = found["trainer"].state
    say(["end", digest(model), best.best_global_step, round(best.best_metric, 6)])


# ---- Lightning ------------------------------------------------------------------------------------------------------


def of_lightning(say: Say, folder: str, number: int, stop: int | None, kill: bool) -> None:
    """A Trainer, which keeps the best three."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        test_step = validation_step

        def val_dataloader(self) -> Any:
            return held_out

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    class Watching(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            stop_if(trainer.global_step, stop, kill)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            say(["step", trainer.global_step, outputs["loss"].item()])

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            say(["end", digest(module)])

    def trainer_of(callbacks: Any, **more: Any) -> Any:
        return Trainer(
            callbacks=[*callbacks, Watching()], accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, val_check_interval=2, default_root_dir=folder, **more,
        )  # fmt: skip

    held_out = torch.utils.data.DataLoader(torch.ones(4, 3), 2)
    loader = torch.utils.data.DataLoader(torch.arange(24.0).reshape(8, 3), 2)
    names = {"Trainer": trainer_of, "module": Module(), "loader": loader, "held_out": held_out}
    page = (partial(play, "docs/coming-from-lightning.md", 0), partial(play, "docs/coming-from-lightning.md", 1))
    page[number](names, Path(folder), {"every_n_train_steps=100": "every_n_train_steps=2"})


# ---- Accelerate -----------------------------------------------------------------------------------------------------


def of_accelerate(say: Say, folder: str, number: int, stop: int | None, kill: bool) -> None:
    """A loop over what Accelerate has prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = torch.utils.data.DataLoader(torch.arange(100.0).reshape(25, 4), 1)
    accelerator = Accelerator(cpu=True)
    names = {"os": os, "distckpt": distckpt, "accelerator": accelerator, "model": model, "optimizer": optimizer}
    names |= {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5), "batches": batches}

    def train_step(batch: torch.Tensor) -> None:
        step = int(batch[0, 0]) // 4
        stop_if(step, stop, kill)
        names["optimizer"].zero_grad()
        loss = names["model"](batch).square().mean()
        accelerator.backward(loss)
        names["optimizer"].step()
        names["scheduler"].step()
        say(["step", step, loss.item()])

    def prepare(*given: Any) -> Any:
        prepared = preparing(*given)
        names.update(zip(("model", "optimizer", "scheduler"), prepared, strict=False))
        return prepared

    preparing, accelerator.prepare = accelerator.prepare, prepare
    names["train_step"] = train_step
    page = (partial(play, "docs/coming-from-accelerate.md", 0), partial(play, "docs/coming-from-accelerate.md", 1))
    try:
        page[number](names, Path(folder))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    say(["end", digest(model)])


# ---- all of them ----------------------------------------------------------------------------------------------------


OTHERWISE = {(of_lightning, 0)}
"""Lightning alone, resumed within an epoch, begins with other batches and random numbers, as its page says."""


def said_in_order(said: list[list[Any]]) -> dict[Any, Any]:
    """What was said of each step, and of the end; the same each time that it was said."""
    found: dict[Any, Any] = {}
    for kind, *more in said:
        key = "end" if kind == "end" else (kind, more[0])
        assert found.setdefault(key, more) == more
    return found


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*ckpt_path=.last", "ignore:.*could not find the monitored key")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty", "ignore:You.re resuming from")
@pytest.mark.parametrize("program", [of_pytorch, of_transformers, of_lightning, of_accelerate])
def test_both_programs_go_on_where_they_failed_with_the_same_losses(program: Program, tmp_path: Path) -> None:
    whole = []
    for number in (0, 1):
        said: list[Any] = []
        for folder in (f"whole-{number}", f"parts-{number}"):
            (tmp_path / folder).mkdir()
        program(said.append, str(tmp_path / f"whole-{number}"), number, None, False)
        whole.append(said_in_order(said))
        parts: list[Any] = []
        for stop in (7, None):
            try:
                program(parts.append, str(tmp_path / f"parts-{number}"), number, stop, False)
            except Stopped:
                assert stop is not None
        assert len(parts) <= len(said) + 10, "it went on, and did not begin again"
        if (program, number) not in OTHERWISE:
            assert said_in_order(parts) == whole[-1]
    assert whole[0] == whole[1]
    assert "end" in whole[0]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("program", [of_pytorch, of_transformers, of_lightning, of_accelerate])
def test_both_programs_go_on_where_they_were_killed_with_the_same_losses(program: Program, tmp_path: Path) -> None:
    found = []
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        ends = [
            Crashing(program, folder=str(tmp_path / str(number)), number=number, stop=stop, kill=True).end(200)
            for stop in (7, None)
        ]
        assert [end.signal for end in ends] == [signal.SIGKILL, 0]
        said = [each for end in ends for each in end.said]
        found.append(said_in_order(ends[0].said if (program, number) in OTHERWISE else said))
    assert found[0].items() <= found[1].items()
    assert "end" in found[1]


# ---- Ray Train ------------------------------------------------------------------------------------------------------


def build(folder: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], float]]:
    """What each worker trains; one of the two is killed once, in its fifteenth step, and each step is written down."""
    import ray.train

    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rank, killed = ray.train.get_context().get_world_rank(), Path(folder) / "killed"

    def is_reported() -> bool:
        """Whether Ray Train knows of a checkpoint, which it hears of only when it asks."""
        notes = (Path(folder) / "ray").rglob("checkpoint_manager_snapshot.json")
        return any(re.search(r'"latest_checkpoint_result": ?\{', note.read_text()) for note in notes)

    def train_step(step: int) -> float:
        if rank == 1 and step == 15 and not killed.exists():
            killed.touch()
            while not is_reported():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss = model(torch.full((3, 4), float(step))).square().mean()
        loss.backward()
        optimizer.step()
        with (Path(folder) / f"rank-{rank}").open("a") as steps:
            steps.write(f"{step} {loss.item()}\n")
        return loss.item()

    return model, optimizer, train_step


def of_ray_train(say: Say, folder: str, number: int) -> None:
    """A job of two workers."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
    names = {"CheckpointConfig": CheckpointConfig, "FailureConfig": FailureConfig, "RunConfig": RunConfig}
    names |= {
        "TorchTrainer": TorchTrainer,
        "scaling": ScalingConfig(num_workers=2),
        "distckpt": distckpt,
        "torch": torch,
    }
    names["build"] = partial(build, folder)
    ray.init(log_to_driver=False)
    page = (partial(play, "docs/coming-from-ray-train.md", 0), partial(play, "docs/coming-from-ray-train.md", 1))
    found = page[number](names, Path(folder), {"1000": "30"})
    say({key: weight.tolist() for key, weight in found["weights"].items()})


@pytest.mark.long
@pytest.mark.timeout(400)
def test_both_programs_of_ray_train_go_on_where_a_worker_was_killed(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    found = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        (weights,) = Crashing(of_ray_train, folder=str(folder), number=number).end(190).said
        assert (folder / "killed").exists()
        steps = [line.split() for rank in (0, 1) for line in (folder / f"rank-{rank}").read_text().splitlines()]
        assert len(steps) < 2 * 30 + 2 * 10 + 2, "it went on, and did not begin again"
        found.append((weights, said_in_order([["step", int(step), float(loss)] for step, loss in steps])))
    assert found[0] == found[1]
