"""What trainers of others have saved, with the trainers themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils.data import DataLoader, TensorDataset

import distckpt
from distckpt.errors import ForeignError
from distckpt.format.others import TORCH_WEIGHTS, WEIGHTS
from tests.support.comparing import same
from tests.support.foreign import refusal, run


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


def _trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer


def _save_as_fsdp(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, in_full: bool) -> None:
    """As ``save_fsdp_model`` and ``save_fsdp_optimizer`` of Accelerate write them, and a scheduler."""
    folder.mkdir()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    if in_full:
        torch.save(of_model, folder / "pytorch_model_fsdp.bin")
        torch.save(of_optimizer, folder / "optimizer.bin")
    else:
        dcp.save({"model": of_model}, checkpoint_id=folder / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": of_optimizer}, checkpoint_id=folder / "optimizer_0")
    torch.save({"last_epoch": 7}, folder / "scheduler.bin")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("in_full", [True, False])
@pytest.mark.parametrize("under", ["model", "net"])
def test_a_state_that_accelerate_has_saved_of_fsdp_goes_on_here(tmp_path: Path, in_full: bool, under: str) -> None:
    model, optimizer = _trained()
    _save_as_fsdp(tmp_path / "state", model, optimizer, in_full)
    told = run("import", tmp_path / "state", tmp_path / "run", "--under", under)
    assert (told["left_out"], told["notes"]) == ({}, [])
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    ours = torch.optim.AdamW(fresh.parameters())
    checkpoint = distckpt.Checkpoint(**{under: fresh}, optimizer=ours, scheduler={"last_epoch": 0})
    with distckpt.read_foreign(tmp_path / "state", under=under) as foreign:
        foreign.restore(checkpoint).assert_consumed()
    checkpoint.restore(tmp_path / "run").assert_existing_objects_matched()
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(ours.state_dict(), optimizer.state_dict())
    assert checkpoint.scheduler == {"last_epoch": 7}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_of_a_sharded_state_what_was_not_finished_or_is_not_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = _trained()
    _save_as_fsdp(tmp_path / "state", model, optimizer, in_full=False)
    (tmp_path / "state" / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(ForeignError, match=r"optimizer \(optimizer_0 has no \.metadata: no save into it was finished"):
        distckpt.read_foreign(tmp_path / "state")
    save_file({"w": torch.ones(3)}, tmp_path / "state" / "model.safetensors")
    torch.save({}, tmp_path / "state" / "optimizer.bin")
    torch.save({}, tmp_path / "state" / "pytorch_model_fsdp_0_rank1.bin")
    assert distckpt.read_foreign(tmp_path / "state").keys()[0] == "model.w"
    [record] = [one for one in caplog.records if one.levelname == "WARNING"]
    for name in ("pytorch_model_fsdp_0", "optimizer_0", "pytorch_model_fsdp_0_rank1.bin"):
        assert f"{name} was not looked at: " in record.getMessage()


@pytest.mark.parametrize("title", ["model{}.safetensors", "pytorch_model{}.bin"])
def test_every_model_beside_the_first_is_told_and_no_part_with_a_gap_before_it_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, title: str
) -> None:
    for number in ("", "_1", "_3", "_12"):
        path = tmp_path / title.format(number)
        (save_file if path.suffix == ".safetensors" else torch.save)({"w": torch.ones(3)}, path)
    for name in ("sampler_1.bin", "random_states_2.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_2.pkl"):
        torch.save({"name": name}, tmp_path / name)
    with distckpt.read_foreign(tmp_path) as foreign:
        assert {"sampler_1.name", "random_states_2.name", "custom_0.name", "custom_2.name"} <= set(foreign.keys())
    [record] = [one for one in caplog.records if one.levelname == "WARNING"]
    for number in (1, 3, 12):
        assert f"{title.format(f'_{number}')} was not looked at: give each model" in record.getMessage()


def test_a_cache_of_links_has_its_other_models_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "snapshot").mkdir()
    for name in ("model.safetensors", "model_1.safetensors", "model_2.safetensors"):
        save_file({"w": torch.ones(3)}, tmp_path / name)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / name)
    assert distckpt.read_foreign(tmp_path / "snapshot").keys() == ["model.w"]
    assert "model_2.safetensors was not looked at" in caplog.text


def test_an_import_that_cannot_be_is_not_advised(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "random_states_0.pkl")
    (tmp_path / "pytorch_model").mkdir()  # of DeepSpeed
    for command in (("import", tmp_path, tmp_path.parent / "run"), ("show", tmp_path)):
        said = refusal(*command)
        assert "a state that Accelerate saved, and none of distckpt" in said
        assert "`distckpt import`" not in said


@pytest.mark.parametrize("name", [*WEIGHTS, *TORCH_WEIGHTS, f"{WEIGHTS[0]}.index.json", "pytorch_model_fsdp_0/x"])
def test_an_import_that_can_be_is_advised(tmp_path: Path, name: str) -> None:
    for file in (tmp_path / "random_states_0.pkl", tmp_path / name):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    assert "which `distckpt import` makes one of" in refusal("show", tmp_path)
