"""Small trainings by Transformers and Lightning that tests run, in the test's own process and on the ranks of a gang."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ITEMS = 22
"""Items of the data: not a multiple of the batch, so epochs end with a smaller one."""


class Stopped(Exception):
    """Training was made to fail."""


class Interruption:
    """At the beginning of a step: a signal to this process, or an exception."""

    def __init__(self, stop_at: int | None, fail_at: int | None, rank: int) -> None:
        self.stop_at = stop_at if int(os.environ.get("RANK", "0")) == rank else None
        self.fail_at = fail_at

    def before_step(self, step: int) -> None:
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        if step == self.fail_at:
            raise Stopped(f"step {step}")


# ---- Transformers ---------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Item i begins with token i."""

    def __init__(self, items: int) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(at))
        tokens[0] = at
        return {"input_ids": tokens, "labels": tokens}


def language_model(dropout: float) -> Any:
    """A GPT-2 of one layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLMLoss"))


def digest(model: torch.nn.Module) -> str:
    """Of all that it holds, over all ranks."""
    whole = (each.full_tensor() if isinstance(each, DTensor) else each for each in model.state_dict().values())
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in whole)).hexdigest()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has it."""
    return any(isinstance(each, DTensor) for each in model.parameters())


@contextmanager
def taken_for_accelerators() -> Iterator[None]:
    """Accelerate, which shards on accelerators alone, takes these processes and their group by gloo for such."""
    from accelerate import state, utils

    gpus = utils.DistributedType.MULTI_GPU
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ, "ACCELERATE_USE_FSDP", "FSDP_VERSION"]:
            patch.setenv(name, os.environ.get(name, ""))  # so that all of them are put back
        patch.setattr(state.PartialState, "_prepare_backend", lambda *_: ("gloo", gpus))
        patch.setattr(state.PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
        state.AcceleratorState._reset_state(reset_partial_state=True)
        yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def transformers(
    directory: str,
    scratch: str,
    *,
    items: int = ITEMS,
    save_steps: int = 3,
    batch: int = 4,
    dropout: float = 0.1,
    stop_at: int | None = None,
    fail_at: int | None = None,
    rank: int = 0,
    plainly: bool = False,
    patience: int = 0,
    by: str = "callback",
    export: bool = False,
    shard: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train for two epochs of 6 steps, of 4 items each over all ranks; what became of it.

    Saved ``by`` the "callback" when it says so, or when the "trainer" says so, or by "itself": Trainer alone.
    """
    if shard:
        blocks = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        arguments |= {"fsdp": "full_shard auto_wrap", "fsdp_config": blocks}
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

    from distckpt.integrations.transformers import DistckptCallback

    interruption = Interruption(stop_at, fail_at, rank)

    class Interrupt(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.save_strategy == "no":  # Trainer's own saves cannot store such
                state.log_history.append({"step": 0, "odd": np.float32(1.5), "odder": object()})

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            interruption.before_step(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves.append(state.global_step)

    model = language_model(dropout)
    seen: list[list[int]] = []
    saves: list[int] = []

    def look(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if module.training:
            seen.append(kwargs["input_ids"][:, 0].tolist())

    model.register_forward_pre_hook(look, with_kwargs=True)
    settings = TrainingArguments(
        output_dir=scratch, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, num_train_epochs=2,
        learning_rate=1e-2, logging_steps=1, per_device_train_batch_size=batch, save_steps=save_steps,
        **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    options = {"save_steps": save_steps, "max_to_keep": None} if by == "callback" else {}
    callback = DistckptCallback(directory, save_timeout=30, export=export, **options)
    callbacks = [Interrupt(), *([callback] if by != "itself" else [])]
    callbacks += [EarlyStoppingCallback(patience)] if patience else []
    trainer = Trainer(model, settings, train_dataset=Texts(items), eval_dataset=Texts(5), callbacks=callbacks)
    try:
        _ = trainer.train() if plainly or by == "itself" else callback.train(trainer)
        error = ""
    except (Stopped, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    state = trainer.state
    return {
        "step": state.global_step,
        "epoch": state.epoch,
        "best": state.best_metric,
        "best_step": state.best_global_step,
        "best_path": state.best_model_checkpoint,
        "saves": saves,
        "weights": digest(model),
        "losses": {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry},
        "seen": seen,
        "error": error,
        "sharded": is_sharded(model),
    }


def accelerate(directory: str, steps: int) -> dict[str, Any]:
    """A loop over what Accelerate has prepared, up to that step: sharded, two batches accumulated for each update."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import distckpt

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), gradient_accumulation_steps=2)
    batches: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), batch_size=2)
    model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, scheduler=scheduler, progress={"step": 0})
    losses = []
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        manager.restore_or_initialize()
        for at, (batch,) in enumerate(batches):
            if not checkpoint.progress["step"] <= at < steps:
                continue
            with accelerator.accumulate(model):
                loss = (model(batch) - batch).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            checkpoint.progress["step"] = at + 1
            if at % 2:
                manager.save(at + 1)
    return {"losses": losses, "weights": digest(model), "sharded": is_sharded(model)}


# ---- Lightning ------------------------------------------------------------------------------------------------------


def lightning(
    directory: str,
    *,
    batch: int = 4,
    ranks: int = 1,
    stop_at: int | None = None,
    fail_at: int | None = None,
    rank: int = 0,
    validate: bool = False,
    resumable: bool = False,
    shard: bool = False,
    callback: Any = None,
    options: dict[str, Any] | None = None,
    begin: str | None = None,
    look: tuple[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a network with dropout on shuffled data; what became of it.

    ``begin`` is the ``ckpt_path`` of ``fit``, and ``look`` what is called afterwards, with its ``ckpt_path``.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    from distckpt.integrations.lightning import DistckptCallback

    interruption = Interruption(stop_at, fail_at, rank)
    seen: list[list[int]] = []

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

        def configure_model(self) -> None:
            if shard:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            interruption.before_step(self.trainer.global_step)
            seen.append(batch[:, 0].int().tolist())
            loss: torch.Tensor = (self.net(batch / ITEMS) ** 2).mean()
            return loss

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("validated", (self.net(batch) ** 2).mean())
            self.predict_step(batch, batch_idx)

        test_step = validation_step

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.looked_at = digest(self) if not shard else ""
            return batch

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            rate = torch.optim.lr_scheduler.StepLR(optimizer, 4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    class Data(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.restores = 0

        def train_dataloader(self) -> Any:
            kind = Resumable if resumable else torch.utils.data.DataLoader
            return kind(torch.arange(3.0 * ITEMS).reshape(3, ITEMS).T, batch, shuffle=not resumable)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(3, 3))

        test_dataloader = predict_dataloader = val_dataloader

        def state_dict(self) -> dict[str, int]:
            return {"restores": self.restores + 1}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.restores = state_dict["restores"]

    class Counting(Callback):
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.batches = state_dict["batches"]

    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": object()}

    seed_everything(1, verbose=False)
    data, counting, module, odd = Data(), Counting(), Net(), callback is None
    if callback is None:
        options = {"save_steps": 3, "max_to_keep": None} if options is None else options
        callback = DistckptCallback(directory, save_timeout=30, **options)
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1) if shard else "ddp"
    over_ranks = {"strategy": strategy, "plugins": [TorchElasticEnvironment()]} if ranks > 1 else {}
    trainer = Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1.0 if validate else 0,
        callbacks=[callback, counting, *([Odd()] if odd else [])],
        **over_ranks, **arguments,
    )  # fmt: skip
    try:
        if trainer.max_epochs != 0:
            trainer.fit(module, datamodule=data, ckpt_path=begin)
        error = ""
    except Stopped as raised:
        error = str(raised)
    if look is not None:
        getattr(trainer, look[0])(module, datamodule=data, ckpt_path=look[1])
    return {
        "looked_at": getattr(module, "looked_at", ""),
        "best": getattr(callback, "best_model_path", ""),
        "score": None if (score := getattr(callback, "best_model_score", None)) is None else float(score),
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "counted": counting.batches,
        "restores": data.restores,
        "seen": seen,
        "error": error,
    }


class Resumable(torch.utils.data.DataLoader[Any]):
    """A loader that can be told how many batches to leave out, once, and that knows how many it has handed out."""

    batches = 0
    left_out = 0

    def __iter__(self) -> Any:
        return self._rest(super().__iter__())

    def _rest(self, batches: Any) -> Any:
        left_out, self.left_out = self.left_out, 0
        for at, each in enumerate(batches):
            self.batches = at + 1
            if at >= left_out:
                yield each

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.left_out = state["batches"]


def on_rank(kind: str, **arguments: Any) -> dict[str, Any]:
    """The same on a rank of a gang, where nobody else turns warnings into errors."""
    sharded = kind == "accelerate" or (kind == "transformers" and arguments.get("shard"))
    with warnings.catch_warnings(), taken_for_accelerators() if sharded else nullcontext():
        warnings.simplefilter("ignore")
        return {"transformers": transformers, "accelerate": accelerate, "lightning": lightning}[kind](**arguments)
