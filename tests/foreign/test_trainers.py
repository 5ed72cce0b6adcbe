"""What trainers of others have saved, with the trainers themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import distckpt
from distckpt.errors import ForeignError
from tests.support.comparing import same
from tests.support.foreign import run


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_a_training_that_lightning_has_saved_goes_on_here(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, width: int = 3, path: Path = Path("x")) -> None:
            super().__init__()
            self.save_hyperparameters()  # a path is nothing that is made without unpickling
            self.net = torch.nn.Linear(4, width)

        def training_step(self, batch: Any, number: int) -> Any:
            return self.net(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    module = Module()
    trainer = Trainer(
        max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4))))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(ForeignError, match=r"lightning\.hyper_parameters\.path \(an object of pathlib"):
        distckpt.read_foreign(tmp_path / "last.ckpt")
    told = run("import", tmp_path / "last.ckpt", tmp_path / "run", "--leave-out", "lightning.hyper_parameters.path")
    assert told["checkpoint"].endswith("ckpt-3")
    fresh = Module()
    optimizers, schedulers = fresh.configure_optimizers()
    checkpoint = distckpt.Checkpoint(model=fresh, optimizer=optimizers[0], lr_scheduler=schedulers[0])
    checkpoint.restore(tmp_path / "run").assert_existing_objects_matched()
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))
    assert same(optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert same(schedulers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict())
    assert distckpt.load(tmp_path / "run", "lightning.hyper_parameters") == {"width": 3}


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [("10KB", "1GB"), ("1GB", "10KB")])
def test_a_folder_that_transformers_has_written_into_twice_is_read_as_it_reads_it(
    tmp_path: Path, sizes: tuple[str, str]
) -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100, n_positions=16))
    for size in sizes:
        with torch.no_grad():
            model.wte.weight.add_(1)
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert {"model.safetensors", "model.safetensors.index.json"} <= {file.name for file in tmp_path.iterdir()}
    found = GPT2Model.from_pretrained(tmp_path).state_dict()
    with distckpt.read_foreign(tmp_path) as foreign:
        assert torch.equal(foreign.tensor("model.wte.weight"), found["wte.weight"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("safe", [True, False])
def test_a_state_that_accelerate_has_saved_goes_on_here(tmp_path: Path, safe: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        scheduler.step()
        accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)

    with pytest.raises(ForeignError, match=r"random_states_0\.numpy_random_seed"):
        distckpt.read_foreign(tmp_path / "state")
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    ours = torch.optim.AdamW(fresh.parameters())
    steps = torch.optim.lr_scheduler.StepLR(ours, 2)
    with distckpt.read_foreign(tmp_path / "state", leave_out="random_states_0") as foreign:
        checkpoint = distckpt.Checkpoint(model=fresh, optimizer=ours, scheduler=steps)
        foreign.restore(checkpoint).assert_consumed()
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(ours.state_dict(), optimizer.state_dict())
    assert same(steps.state_dict(), scheduler.state_dict())
