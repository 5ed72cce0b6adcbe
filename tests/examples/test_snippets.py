"""Every program in a document runs, with what stands around it in a reader's own, and does what the document says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distckpt
from distckpt.directory.picture import picture_of
from distckpt.storage import open_store
from tests.support.crashing import Say
from tests.support.crashing import run as run_aside
from tests.support.gang import free_port
from tests.support.snippets import play, snippets
from tests.support.warm import ROOT

DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]

ONCE = ", timeout=0)"
"""In place of a closing parenthesis: to follow until there is nothing new."""

REPORT = "with checkpoint:\n        checkpoint.report({'loss': 2.0})"


def test_every_snippet_is_played_by_some_test() -> None:
    texts = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    played = {(document, int(number)) for document, number in re.findall(r'play[(,]\s*"([^"]+)",\s*(\d+)', texts)}
    there = {(document, number) for document in DOCUMENTS for number in range(len(snippets(document)))}
    by_test_readme = {("README.md", 0), ("README.md", 1)}
    assert played | by_test_readme == there
    assert not played & by_test_readme


class Job:
    """What a reader's program has: a model, an optimizer, a position, and a run of two checkpoints in ``run-7``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = str(folder / "run-7")
        self.model = model_of(1)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.progress = {"step": 0}
        self.checkpoint = distckpt.Checkpoint(model=self.model, optimizer=self.optimizer, progress=self.progress)

    def saved(self) -> Job:
        with distckpt.CheckpointManager(self.checkpoint, self.directory) as manager:
            for number in (1, 2):
                self.train_step()
                manager.save(number)
        return self

    def train_step(self) -> None:
        self.progress["step"] += 1
        self.model.weight.data += 1

    def names(self, **more: Any) -> dict[str, Any]:
        return {"distckpt": distckpt, "torch": torch, **vars(self), "train_step": self.train_step, **more}


def model_of(number: float) -> nn.Linear:
    """Whose weights are that number."""
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, number)
    return model


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def kept(directory: str | Path, number: int, **objects: Any) -> None:
    """A run has saved these."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(**objects), directory) as manager:
        manager.save(number)


def metrics(job: Job) -> dict[str, list[tuple[int, float]]]:
    """What was reported, by number."""
    return picture_of(open_store(job.directory)).metrics


# ---- README -------------------------------------------------------------------------------------------------------


def test_of_the_readme(job: Job) -> None:
    Job(job.folder).saved()
    (job.folder / "run-7").rename(job.folder / "run-6")
    play("README.md", 2, job.names(), job.folder)
    assert torch.equal(job.model.weight, torch.full((4, 4), 3.0))
    assert job.progress == {"step": 0}, "the weights alone"
    layers = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([model_of(5)])})})
    kept(job.directory, 1, **layers)
    found = play("README.md", 3, job.names(), job.folder, {"ckpt-4200": "ckpt-1"})
    assert torch.equal(found["weight"], torch.full((4, 4), 5.0))


# ---- evaluation, retention, operations ------------------------------------------------------------------------------


def test_of_evaluation(job: Job) -> None:
    job.saved()
    model, logged = model_of(0), []
    wandb = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    names = job.names(model=model, evaluate=lambda model: model.weight[0, 0].item(), wandb=wandb)
    play("docs/EVALUATION.md", 0, names, job.folder, {'run-7")': f'run-7"{ONCE}'})
    assert model.weight[0, 0].item() == 3, "of the newest"
    assert metrics(job) == {"loss": [(2, 3.0)]}
    play("docs/EVALUATION.md", 1, names, job.folder, {'"all")': f'"all"{ONCE}'})
    told = {"...": REPORT, '"eval"': '"logged", mode="all", timeout=0'}
    play("docs/EVALUATION.md", 2, names, job.folder, told)
    assert logged == [(1, {"loss": 2.0}), (2, {"loss": 2.0})]


def evaluate_sharded(say: Say, folder: str) -> None:
    """As the one rank of a group."""
    import contextlib

    import torch.distributed
    from torch.distributed.fsdp import fully_shard

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    model = model_of(0)
    names = {"fully_shard": fully_shard, "rank": 0, "model": model, "distckpt": distckpt, "contextlib": contextlib}
    names |= {"torch": torch, "directory": f"{folder}/run-7"}
    names["evaluate"] = lambda model: model.weight.full_tensor()[0, 0].item()
    play("docs/EVALUATION.md", 3, names, None, {'"eval")': f'"eval"{ONCE}'})
    say(type(model).__name__)


def test_of_sharded_evaluation(job: Job) -> None:
    job.saved()
    assert run_aside(evaluate_sharded, folder=str(job.folder)).said == ["FSDPLinear"]
    assert metrics(job) == {"loss": [(2, 3.0)]}


def test_of_retention(job: Job) -> None:
    job.saved()
    play("docs/RETENTION.md", 0, job.names(), job.folder, {"...": "manager.save(1000).result()"})
    names = job.names(evaluate=lambda checkpoint: float(checkpoint.number))
    play("docs/RETENTION.md", 1, names, job.folder, {'"all")': f'"all"{ONCE}'})
    assert metrics(job) == {"loss": [(1, 1.0), (2, 2.0), (1000, 1000.0)]}
    logged: list[Any] = []
    names = job.names(wandb=SimpleNamespace(log=logged.append))
    play("docs/RETENTION.md", 2, names, job.folder, {"...": REPORT, '"eval"': '"logged", timeout=0'})
    assert logged == [{"loss": 2.0, "checkpoint": 1000}]


def test_of_operations(job: Job) -> None:
    logged: list[Any] = []
    with distckpt.CheckpointManager(job.checkpoint, job.directory) as manager:
        play("docs/OPERATIONS.md", 0, {"manager": manager, "wandb": SimpleNamespace(log=logged.append)})
    assert logged[0]["checkpoint/saves"] == 0


# ---- what goes in, and what comes from elsewhere --------------------------------------------------------------------


def test_of_files_of_other_programs(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (job.folder / "llama").mkdir()
    save_file(dict(model_of(7).state_dict()), job.folder / "llama" / "model.safetensors")
    play("docs/coming-from-files.md", 0, job.names(), job.folder)
    assert torch.equal(job.model.weight, torch.full((4, 4), 7.0))
    assert "safetensors" in capsys.readouterr().out


def test_of_frozen_bases(job: Job) -> None:
    job.model.bias.requires_grad_(False)
    found = play("docs/saving.md", 1, job.names(), job.folder)
    assert found["base"] == f"{job.folder}/base-1"
    assert distckpt.latest_checkpoint(job.directory) is None


def test_of_restores_by_parts(job: Job) -> None:
    def objects(number: float) -> dict[str, Any]:
        return {"model": model_of(number), "encoder": model_of(number + 1), "progress": {"step": int(number)}}

    kept(job.folder / "other-run", 1, **objects(1))
    kept(job.folder / "base", 1, model=nn.ModuleDict({"encoder": model_of(8)}))
    kept(job.directory, 4200, model=model_of(3), encoder=model_of(4))
    mine = objects(0)
    checkpoint = distckpt.Checkpoint(**mine)
    with distckpt.CheckpointManager(checkpoint, job.directory) as manager:
        names = job.names(manager=manager, checkpoint=checkpoint)
        before = play("docs/saving.md", 3, names, job.folder, {"manager.restore(4200, partial=True)": "manager"})
        assert before["checkpoint"].progress == {"step": 1}
        assert [mine[name].weight[0, 0].item() for name in ("model", "encoder")] == [1, 8]
        play("docs/saving.md", 3, names, job.folder)
        assert [mine[name].weight[0, 0].item() for name in ("model", "encoder")] == [3, 4]
        assert manager.restore_status is not None
        assert manager.restore_status.missing == ("progress.step",), "it names what was left alone"


def test_of_experts(job: Job) -> None:
    module = nn.Module()
    names = {"rank": 1, "experts": 8, "world_size": 4, "self": module, "nn": nn, "Expert": lambda: nn.Linear(2, 2)}
    play("docs/what-is-saved.md", 0, names)
    assert [*module.experts] == ["2", "3"]  # type: ignore[arg-type]


def test_of_tensorflow(job: Job) -> None:
    def train_step() -> None:
        job.model.weight.data += 1

    seen = []
    names = job.names(steps=20, train_step=train_step, evaluate=lambda model: seen.append(model.weight[0, 0].item()))
    play(
        "docs/coming-from-tensorflow.md",
        0,
        names,
        job.folder,
        {'run-7")': f'run-7"{ONCE}'},
    )
    assert seen == [21.0]
    kept = [distckpt.load(path, "progress.step") for path in (f"{job.directory}/ckpt-10", f"{job.directory}/ckpt-20")]
    assert kept == [10, 20]


# ---- loops, exports, quantization -----------------------------------------------------------------------------------


def test_of_hooks(job: Job) -> None:
    names = job.names(my_listener=distckpt.CheckpointSaverListener())
    told = {"not session.should_stop()": "not session.should_stop() and progress['step'] < 3"}
    play("docs/hooks.md", 0, names, job.folder, told)
    assert distckpt.load(job.directory, "progress.step") == 3


@pytest.mark.timeout(120)
def test_of_exports(job: Job) -> None:
    names = job.names(make_model=lambda: nn.Linear(8, 2), checkpoint=distckpt.Checkpoint(encoder=nn.Linear(8, 2)))
    told = {"\n...\n": "\nmanager.save(1)\nmanager.close()\n", '"model", example': '"encoder", example'}
    play("docs/export.md", 0, names, job.folder, told)
    assert distckpt.latest_export(job.directory) is not None


def test_of_quantization() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = play("docs/quantization.md", 0, {"distckpt": distckpt, "model": model})
    assert found["model"](torch.ones(1, 4)).shape == (1, 4)
